(function () {
  var root = document.documentElement, buttons = document.querySelectorAll("button[data-set-lang]");
  function set(lang) {
    root.lang = lang;
    buttons.forEach(function (b) { b.setAttribute("aria-pressed", String(b.dataset.setLang === lang)); });
  }
  buttons.forEach(function (b) { b.addEventListener("click", function () { set(b.dataset.setLang); }); });
  set(root.lang);

  function wilson(wrong, n) { // the same interval as fledge.core.intervals.wilson
    var z = 1.959963984540054, p = wrong / n, shrink = 1 + z * z / n, centre = (p + z * z / (2 * n)) / shrink;
    var half = z / shrink * Math.sqrt(p * (1 - p) / n + z * z / (4 * n * n));
    return [wrong === 0 ? 0 : Math.max(0, centre - half), wrong === n ? 1 : Math.min(1, centre + half)];
  }
  document.querySelectorAll("[data-side]").forEach(function (side) {
    var out = side.querySelector("output");
    side.addEventListener("change", function () {
      var n = side.querySelectorAll("input:checked").length;
      var wrong = side.querySelectorAll('input[value="wrong"]:checked').length;
      if (!n) { return; }
      var range = wilson(wrong, n);
      out.textContent = (100 * wrong / n).toFixed(1) + " % (" + (100 * range[0]).toFixed(1) + "–" +
        (100 * range[1]).toFixed(1) + ", n = " + n + ")";
    });
  });
})();
