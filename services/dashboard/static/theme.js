// Runs before the first paint, so that a chosen theme doesn't flash.
(() => {
  try {
    const theme = localStorage.getItem("unmask-theme");
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  } catch {
    // no storage: the system's preference holds
  }
})();
