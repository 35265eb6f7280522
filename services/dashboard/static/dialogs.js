// The modal dialogs of the shell: keyboard help and the token.

import { checkToken, token } from "./api.js";
import { h, put, setText } from "./dom.js";

/** Show a modal; `build(close)` returns what it holds. Returns the dialog element. */
export function dialog(title, build) {
  closeDialog();
  const modal = h("dialog.dialog", { ariaLabel: title });
  const close = () => modal.close();
  modal.addEventListener("close", () => modal.remove());
  modal.addEventListener("click", (event) => event.target === modal && close());
  const dismiss = h("button.icon-button", { type: "button", ariaLabel: "Close", onclick: close }, "✕");
  put(modal, h("div.dialog-body", null, h("header", null, h("h2", null, title), dismiss), build(close)));
  document.body.append(modal);
  modal.showModal();
  return modal;
}

/** True when one was open. */
export function closeDialog() {
  const open = document.querySelector("dialog[open]");
  open?.close();
  return Boolean(open);
}

const NAMES = { Escape: "Esc", " ": "Space", ArrowLeft: "←", ArrowRight: "→", ArrowUp: "↑", ArrowDown: "↓" };

/** The keys of the open page and those that hold everywhere. */
export function showHelp(pageKeys, globalKeys) {
  const list = (bindings) =>
    h(
      "dl.keys",
      null,
      Object.entries(bindings).map(([key, [, text]]) => h("div", null, h("dt", null, h("kbd", null, NAMES[key] ?? key)), h("dd", null, text))),
    );
  dialog("Help", () => [
    Object.keys(pageKeys).length > 0 && [h("h3", null, "On this page"), list(pageKeys)],
    h("h3", null, "Everywhere"),
    list(globalKeys),
    h("p.note", null, "All that is shown here can be read by programs too: ", h("a", { href: "#/api", onclick: () => closeDialog() }, "the API"), "."),
  ]);
}

/** Ask for the token that control needs; `changed` is called when it was set or forgotten. */
export function showToken(changed) {
  dialog("Token for control", (close) => {
    const field = h("input", { type: "password", autocomplete: "off", name: "token", required: true, spellcheck: false });
    const wrong = h("p.wrong", { role: "alert" });
    const save = (value) => {
      token.set(value);
      changed();
      close();
    };
    const submit = async (event) => {
      event.preventDefault();
      const given = field.value.trim();
      setText(wrong, "");
      try {
        if (!/^[!-~]+$/.test(given)) throw new Error("A token has letters, digits and punctuation of ASCII only, and no blanks.");
        await checkToken(given);
      } catch (error) {
        setText(wrong, error.detail ?? error.message);
        field.select();
        return;
      }
      save(given);
    };
    return h(
      "form.stack",
      { onsubmit: submit },
      h("p", null, "Without it this page only reads. The service printed at its start where it lies: RUNS/.dashboard-token unless said otherwise. It stays in this tab until you close it."),
      h("label.field", null, h("span", null, "Token"), field),
      wrong,
      h(
        "div.row.end",
        null,
        token.get() && h("button.button", { type: "button", onclick: () => save("") }, "Forget it"),
        h("button.button.primary", { type: "submit" }, "Use it"),
      ),
    );
  });
}
