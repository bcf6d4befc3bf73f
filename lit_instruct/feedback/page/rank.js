// The form of a ranking: each response rated from 1 to 7 and flagged, then all of them put in order.

import { announce, button, checkbox, element, textBlock } from "./dom.js";
import { byRating, fromRanks, levelOf, place, step, toRanks } from "./ladder.js";

export const letter = (response) => String.fromCharCode(65 + response);

export class RankForm {
  // settings: response_flags, max_rating. onChange is called after each change by the labeler.
  constructor(task, settings, onChange) {
    this.texts = task.shown.responses;
    this.settings = settings;
    this.onChange = onChange;
    const judged = task.draft?.responses ?? this.texts.map(() => ({ rating: null, flags: [], rank: null }));
    this.ratings = judged.map((one) => one.rating);
    this.flags = judged.map((one) => new Set(one.flags));
    this.ladder = fromRanks(judged.map((one) => one.rank));
    this.cards = this.texts.map((_, response) => this.#card(response));
    this.panel = element("section", { class: "order", "aria-labelledby": "order-title" });
    this.#showLadder();
    this.node = element("div", { class: "ranking" }, element("div", { class: "cards" }, ...this.cards), this.panel);
  }

  content() {
    const ranks = toRanks(this.ladder, this.texts.length);
    return {
      responses: this.texts.map((_, response) => ({
        rating: this.ratings[response],
        flags: [...this.flags[response]],
        rank: ranks[response],
      })),
    };
  }

  // What is missing, and the element to go to; null: nothing.
  missing() {
    const unrated = this.ratings.flatMap((rating, response) => (rating === null ? [response] : []));
    const parts = [];
    const which = (responses) => (responses.length === this.texts.length ? "all responses" : names(responses));
    if (unrated.length) parts.push(`rate ${which(unrated)}`);
    if (this.ladder.tray.length) parts.push(`place ${which(this.ladder.tray)} in the order`);
    if (!parts.length) return null;
    const target = unrated.length ? this.cards[unrated[0]] : this.#chip(this.ladder.tray[0]);
    return { words: `Still to do: ${parts.join(", and ")}.`, target };
  }

  // Keys that this form knows; returns whether it was one.
  key(event) {
    const card = this.cards.findIndex((node) => node.contains(document.activeElement));
    if (/^[1-9]$/.test(event.key) && card >= 0) {
      if (Number(event.key) > this.settings.max_rating) return false;
      this.#ratingInput(card, Number(event.key)).click();
    } else if (event.key === "f" && card >= 0) {
      const details = this.cards[card].querySelector("details");
      details.open = !details.open;
      (details.open ? details.querySelector("input") : this.cards[card]).focus();
    } else if (event.key === "j" || event.key === "k") {
      const next = event.key === "j" ? card + 1 : card < 0 ? this.cards.length - 1 : card - 1;
      this.cards[Math.min(Math.max(next, 0), this.cards.length - 1)].focus();
    } else if (event.key === "o") {
      this.#orderByRating();
    } else if (event.key === "l") {
      this.panel.querySelector(".chip-main").focus();
    } else {
      return false;
    }
    return true;
  }

  // -- rating and flags

  #card(response) {
    const name = letter(response);
    const buttons = [];
    for (let rating = 1; rating <= this.settings.max_rating; rating++) buttons.push(this.#rating(response, rating));
    const rating = element(
      "fieldset",
      { class: "rating" },
      element("legend", {}, "Overall quality", element("span", { class: "hidden-text" }, ` of response ${name}`)),
      element("div", { class: "scale" }, ...buttons),
      element("div", { class: "ends quiet", "aria-hidden": "true" }, element("span", {}, "worst"), element("span", {}, "best")),
    );
    return element(
      "article",
      { class: "card", tabindex: "-1", "aria-labelledby": `title-${response}` },
      element("h3", { id: `title-${response}` }, element("span", { class: "hidden-text" }, "Response "), name),
      textBlock(this.texts[response], `Text of response ${name}`),
      rating,
      this.#flagFields(response),
    );
  }

  #rating(response, rating) {
    const input = element("input", { type: "radio", name: `rating-${response}`, value: String(rating) });
    input.checked = this.ratings[response] === rating;
    input.addEventListener("change", () => {
      this.ratings[response] = rating;
      this.#showLadder();
      this.onChange();
    });
    return element("label", {}, input, element("span", {}, String(rating)));
  }

  #ratingInput(response, rating) {
    return this.cards[response].querySelector(`.rating input[value="${rating}"]`);
  }

  #flagFields(response) {
    const summary = element("summary");
    const known = Object.entries(this.settings.response_flags);
    const tell = () => {
      const set = known.filter(([flag]) => this.flags[response].has(flag)).map(([, label]) => label.split(":")[0]);
      summary.replaceChildren("Flags: ", element("span", { class: set.length ? "set" : "quiet" }, set.join(" · ") || "none"));
    };
    const boxes = known.map(([flag, label]) =>
      checkbox(label, this.flags[response].has(flag), (checked) => {
        if (checked) this.flags[response].add(flag);
        else this.flags[response].delete(flag);
        tell();
        this.onChange();
      }, flag),
    );
    tell();
    return element("details", { class: "flags" }, summary, element("div", { class: "checks" }, ...boxes));
  }

  // -- the order

  #showLadder(focused = null) {
    const { levels, tray } = this.ladder;
    const rows = [this.#gap(0)];
    levels.forEach((group, level) => {
      const chips = group.map((response) => this.#makeChip(response));
      rows.push(
        element(
          "li",
          { class: "level", "data-into": String(level) },
          element("span", { class: "rank", "aria-hidden": "true" }, String(level + 1)),
          element("ul", { class: "group" }, ...chips),
        ),
        this.#gap(level + 1),
      );
    });
    const children = [
      element("h2", { id: "order-title" }, "Order"),
      element("p", { class: "quiet" }, "Best on top. Equally good responses share a rank."),
      button("Order by rating", { class: "plain by-rating" }, () => this.#orderByRating()),
      element("ol", { class: "ladder" }, ...rows),
    ];
    if (tray.length) {
      const chips = tray.map((response) => this.#makeChip(response));
      children.push(
        element("h3", {}, "Not placed yet"),
        element("ul", { class: "tray group", "data-tray": true }, ...chips),
      );
    }
    const hint = this.#contradiction();
    if (hint) children.push(element("p", { class: "hint" }, hint));
    this.panel.replaceChildren(...children);
    if (focused !== null) this.#chip(focused).focus();
  }

  #gap(before) {
    const empty = !this.ladder.levels.length;
    return element("li", { class: empty ? "gap empty" : "gap", "data-before": String(before), "aria-hidden": "true" }, empty ? "Drag the best response here" : "");
  }

  #makeChip(response) {
    const rating = this.ratings[response];
    const start = [...this.texts[response].slice(0, 200)].slice(0, 90).join("").trim(); // by characters, not halves
    const main = button("", { class: "chip-main", "aria-label": this.#position(response) }, () => {
      if (levelOf(this.ladder, response) < 0) this.#move(response, step(this.ladder, response, -1));
    });
    main.append(
      element("span", { class: "grip", "aria-hidden": "true" }, "⠿"),
      element("strong", {}, letter(response)),
      element("bdi", { class: "start" }, start || "(empty)"),
      element("span", { class: "rated" }, rating === null ? "–" : String(rating)),
    );
    main.addEventListener("keydown", (event) => this.#chipKey(event, response));
    main.addEventListener("pointerdown", (event) => this.#drag(event, response, main));
    const up = button("↑", { class: "nudge", tabindex: "-1", "aria-label": `Move ${letter(response)} up` }, () =>
      this.#move(response, step(this.ladder, response, -1)),
    );
    const down = button("↓", { class: "nudge", tabindex: "-1", "aria-label": `Move ${letter(response)} down` }, () =>
      this.#move(response, step(this.ladder, response, 1)),
    );
    return element("li", { class: "chip", "data-response": String(response) }, main, up, down);
  }

  #chip(response) {
    return this.panel.querySelector(`[data-response="${response}"] .chip-main`);
  }

  #chipKey(event, response) {
    const moves = {
      ArrowUp: () => step(this.ladder, response, -1),
      ArrowDown: () => step(this.ladder, response, 1),
      Home: () => place(this.ladder, response, { before: 0 }),
      End: () => place(this.ladder, response, { before: this.ladder.levels.length }),
      Delete: () => place(this.ladder, response, {}),
      Backspace: () => place(this.ladder, response, {}),
    };
    if (!(event.key in moves) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    this.#move(response, moves[event.key]());
  }

  #move(response, ladder) {
    this.ladder = ladder;
    this.#showLadder(response);
    announce(this.#position(response));
    this.onChange();
  }

  #orderByRating() {
    if (this.ratings.includes(null)) {
      announce("Rate all responses first.");
      return;
    }
    this.ladder = byRating(this.ratings);
    this.#showLadder(this.ladder.levels[0][0]);
    announce(`Ordered by rating, best first: ${this.ladder.levels.map((group) => names(group)).join("; ")}.`);
    this.onChange();
  }

  #position(response) {
    const level = levelOf(this.ladder, response);
    const rated = this.ratings[response] === null ? "not rated" : `rated ${this.ratings[response]}`;
    if (level < 0) return `Response ${letter(response)}, ${rated}, not placed`;
    const others = this.ladder.levels[level].filter((other) => other !== response);
    const tied = others.length ? `, tied with ${names(others)}` : "";
    return `Response ${letter(response)}, ${rated}, rank ${level + 1} of ${this.ladder.levels.length}${tied}`;
  }

  // A response that stands above one with a higher rating: may be meant so, more often is a slip.
  #contradiction() {
    const { levels } = this.ladder;
    for (let level = 0; level < levels.length; level++) {
      for (const above of levels[level]) {
        for (const below of levels.slice(level + 1).flat()) {
          const [high, low] = [this.ratings[above], this.ratings[below]];
          if (high !== null && low !== null && high < low) {
            return `${letter(above)} (rated ${high}) stands above ${letter(below)} (rated ${low}). Is that meant?`;
          }
        }
      }
    }
    return null;
  }

  // -- dragging, with mouse, pen and finger alike

  #drag(event, response, main) {
    const touch = event.pointerType === "touch";
    if (event.button !== 0 || (touch && !event.target.closest(".grip"))) return; // else a finger could not scroll
    const start = { x: event.clientX, y: event.clientY };
    const chip = main.parentElement;
    let target = null;
    let dragging = false;
    const over = (x, y) => document.elementFromPoint(x, y)?.closest("[data-into], [data-before], [data-tray]");
    const move = (now) => {
      const [dx, dy] = [now.clientX - start.x, now.clientY - start.y];
      if (!dragging && Math.hypot(dx, dy) < 5) return;
      dragging = true;
      document.body.classList.add("dragging");
      chip.classList.add("dragged");
      chip.style.transform = `translate(${dx}px, ${dy}px)`;
      target?.classList.remove("target");
      target = this.panel.contains(chip) ? over(now.clientX, now.clientY) : null;
      target?.classList.add("target");
    };
    const end = (dropped) => {
      main.removeEventListener("pointermove", move);
      main.removeEventListener("pointerup", drop);
      main.removeEventListener("pointercancel", cancel);
      removeEventListener("keydown", escape, true);
      document.body.classList.remove("dragging");
      if (!dragging) return;
      main.addEventListener("click", (click) => click.stopImmediatePropagation(), { once: true, capture: true });
      if (dropped && target) this.#move(response, place(this.ladder, response, placeOf(target)));
      else this.#showLadder(response);
    };
    const drop = () => end(true);
    const cancel = () => end(false);
    const escape = (key) => key.key === "Escape" && cancel();
    main.setPointerCapture(event.pointerId);
    main.addEventListener("pointermove", move);
    main.addEventListener("pointerup", drop);
    main.addEventListener("pointercancel", cancel);
    addEventListener("keydown", escape, true);
  }
}

function placeOf(node) {
  if (node.dataset.into !== undefined) return { into: Number(node.dataset.into) };
  if (node.dataset.before !== undefined) return { before: Number(node.dataset.before) };
  return {};
}

function names(responses) {
  const letters = responses.map(letter);
  return letters.length < 2 ? letters.join("") : `${letters.slice(0, -1).join(", ")} and ${letters.at(-1)}`;
}
