// The forms of the other tasks: writing a response or a prompt, and flagging a prompt.

import { checkbox, element } from "./dom.js";

export class WriteForm {
  constructor(task, settings, onChange) {
    this.field = task.kind === "demonstrate" ? "response" : "prompt";
    this.input = element("textarea", { id: "writing", rows: "12", dir: "auto", maxlength: String(settings.max_text) });
    this.input.value = task.draft?.[this.field] ?? "";
    const count = element("p", { class: "quiet count" });
    const tell = () => (count.textContent = `${this.input.value.trim().split(/\s+/).filter(Boolean).length} words`);
    this.input.addEventListener("input", () => {
      tell();
      onChange();
    });
    tell();
    const label = element("label", { for: "writing", class: "heading" }, this.field === "response" ? "Your response" : "Your prompt");
    this.node = element("section", { class: "writing" }, label, this.input, count);
  }

  content() {
    return { [this.field]: this.input.value };
  }

  missing() {
    return this.input.value.trim() ? null : { words: `Write a ${this.field}, or skip the task.`, target: this.input };
  }

  key() {
    return false;
  }
}

export class FlagForm {
  constructor(task, settings, onChange) {
    this.flags = new Set(task.draft?.flags ?? []);
    const boxes = Object.entries(settings.prompt_flags).map(([flag, label]) =>
      checkbox(label, this.flags.has(flag), (checked) => {
        if (checked) this.flags.add(flag);
        else this.flags.delete(flag);
        onChange();
      }, flag),
    );
    this.node = element(
      "fieldset",
      { class: "flagging" },
      element("legend", {}, "What holds for this prompt? Nothing, if it is fine."),
      element("div", { class: "checks" }, ...boxes),
    );
  }

  content() {
    return { flags: [...this.flags] };
  }

  missing() {
    return null;
  }

  key() {
    return false;
  }
}
