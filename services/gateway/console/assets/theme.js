// The colour scheme, set before the first paint: the system's, or what was chosen here.
// A classic script, because modules run after the page was drawn.
(() => {
  const KEY = "expertfleet.theme";
  const ORDER = ["system", "light", "dark"];

  const stored = () => {
    try {
      const value = localStorage.getItem(KEY);
      return ORDER.includes(value) ? value : "system";
    } catch {
      return "system"; // storage is switched off
    }
  };

  const apply = (theme) => {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
  };

  apply(stored());
  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    let theme = stored();
    const show = () => {
      button.textContent = `Theme: ${theme}`;
    };
    show();
    button.addEventListener("click", () => {
      theme = ORDER[(ORDER.indexOf(theme) + 1) % ORDER.length];
      try {
        localStorage.setItem(KEY, theme);
      } catch {
        // it lasts as long as the page then
      }
      apply(theme);
      show();
    });
  });
})();
