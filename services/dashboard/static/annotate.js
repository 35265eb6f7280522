// What people write about a run: tags, a note, archive it.

import { at, patch, token } from "./api.js";
import { h, setText } from "./dom.js";

/** Write the changes; true when they are written. What went wrong is told. */
export async function annotate(app, id, changes) {
  try {
    return await patch(at`runs/${id}/annotation`, changes);
  } catch (error) {
    if (error.status === 401) token.set("");
    app.toast(error.detail ?? error.message, "error");
    return null;
  }
}

/** The dialog; `written(told)` is called with what is then told of the run. */
export function openAnnotation(app, run, written) {
  app.dialog("Tags and note", (close) => {
    const tags = h("input", { type: "text", name: "tags", value: (run.tags ?? []).join(" "), placeholder: "paper baseline" });
    const note = h("textarea", { name: "note", rows: 5, value: run.note ?? "", maxLength: 4000 });
    const archived = h("input", { type: "checkbox", name: "archived", checked: run.archived });
    const wrong = h("p.wrong", { role: "alert" });
    const submit = async (event) => {
      event.preventDefault();
      const words = tags.value.split(/[\s,]+/).filter(Boolean);
      if (words.length > 20 || words.some((word) => word.length > 50)) return setText(wrong, "At most 20 tags of 50 characters.");
      const told = await annotate(app, run.id, { tags: words, note: note.value, archived: archived.checked });
      if (!told) return;
      close();
      written({ tags: told.tags, note: told.note, archived: told.archived });
    };
    return h(
      "form.stack",
      { onsubmit: submit },
      h("p.note.clip", { title: run.id }, run.id),
      h("label.field", null, h("span", null, "Tags, with blanks between them"), tags),
      h("label.field", null, h("span", null, "Note"), note),
      h("label.row", null, archived, h("span", null, "Archived: left out of the list of runs")),
      wrong,
      h("div.row.end", null, h("button.button", { type: "button", onclick: close }, "Leave as it was"), h("button.button.primary", { type: "submit" }, "Write")),
    );
  });
}
