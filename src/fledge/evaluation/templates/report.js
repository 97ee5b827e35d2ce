(function () {
  var root = document.documentElement, buttons = document.querySelectorAll("button[data-set-lang]");
  function set(lang) {
    root.lang = lang;
    buttons.forEach(function (b) { b.setAttribute("aria-pressed", String(b.dataset.setLang === lang)); });
  }
  buttons.forEach(function (b) { b.addEventListener("click", function () { set(b.dataset.setLang); }); });
  set(root.lang);
})();
