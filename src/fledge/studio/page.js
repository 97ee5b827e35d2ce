// The few things that only the browser can do: keys, growing input, following the text, links, copying, cookies.
window.fledge = {
  input: () => document.querySelector(".fl-input"),

  // Enter sends; Shift+Enter breaks the line; Enter that only ends an input method's composition does neither.
  keydown(event, emit) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    if (event.target.value.trim()) emit(event.target.value);
  },

  grow(area) {
    area.style.height = "auto";
    area.style.height = Math.min(area.scrollHeight, 200) + "px";
  },

  clear() {
    const area = this.input();
    area.value = "";
    area.style.height = "";
    area.focus({ preventScroll: true });
    this.follow = true;
  },

  remember(name, value) {
    document.cookie = `${name}=${value}; path=/; max-age=31536000; SameSite=Lax`;
  },

  speak(lang, title) {
    document.documentElement.lang = lang;
    document.title = title;
  },

  async copy(text, button, done) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {  // not a secure context (plain HTTP from another machine)
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    const label = button.querySelector("span");
    const before = label.textContent;
    label.textContent = done;
    setTimeout(() => { label.textContent = before; }, 1500);
  },

  // Stay at the end of the text while it grows, unless the reader has scrolled up.
  follow: true,
  watch() {
    const area = document.querySelector(".fl-scroll");
    area.addEventListener("scroll", () => {
      this.follow = area.scrollHeight - area.scrollTop - area.clientHeight < 60;
    }, { passive: true });
    new MutationObserver(() => {
      if (this.follow) area.scrollTop = area.scrollHeight;
    }).observe(area, { childList: true, subtree: true, characterData: true });
    if (matchMedia("(hover: hover)").matches) this.input().focus();
  },
};

document.addEventListener("input", (event) => {
  if (event.target.matches(".fl-input")) fledge.grow(event.target);
});

document.addEventListener("click", (event) => {
  const link = event.target.closest(".fl-answer a[href]");
  if (!link) return;
  event.preventDefault();
  window.open(link.href, "_blank", "noopener,noreferrer");
});
