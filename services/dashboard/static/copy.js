// Text that people take elsewhere: commands and paths.

import { h } from "./dom.js";

/** A button that copies `text()`; where the browser gives no clipboard (a page that is not from this machine), it marks
 * the text in `shown` instead. */
export function copyButton(text, shown = null, label = "Copy") {
  const button = h("button.button.copy", { type: "button", onclick: copy }, label);
  let timer = null;

  async function copy() {
    try {
      await navigator.clipboard.writeText(text());
      button.textContent = "Copied";
    } catch {
      if (shown) getSelection().selectAllChildren(shown);
      button.textContent = shown ? "Press Ctrl+C" : "No clipboard";
    }
    clearTimeout(timer);
    timer = setTimeout(() => (button.textContent = label), 2500);
  }

  return button;
}

/** A command with its button. */
export function commandLine(text) {
  const code = h("code.command", null, text);
  return h("div.command-line", null, code, copyButton(() => text, code));
}
