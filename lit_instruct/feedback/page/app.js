// The page: one task after another. Drafts are saved while they are made; an answer is saved before the next task comes.

import { ApiError, call, callUntilHeard, newKey, onNewToken, takeToken } from "./api.js";
import { announce, button, byId, element, textBlock, tree } from "./dom.js";
import { RankForm } from "./rank.js";
import { FlagForm, WriteForm } from "./write.js";

const KINDS = {
  rank: { title: "Rate and order the responses", form: RankForm },
  demonstrate: { title: "Write the response", form: WriteForm },
  write_prompt: { title: "Write a prompt", form: WriteForm },
  flag_prompt: { title: "Look at a prompt", form: FlagForm },
};
const ROLES = { system: "System", user: "User", assistant: "Assistant" };
const DRAFT_DELAY = 600; // milliseconds after the last change

let settings = null;
let current = null; // {task, form, note}: what is on the page
let busy = false; // while an answer, a skip or an undo is under way
let draftTimer = 0;
let draftUnderWay = Promise.resolve();

// -- time in view

const stopwatch = {
  total: 0,
  since: null,
  start(seconds) {
    this.total = seconds;
    this.since = document.visibilityState === "visible" ? performance.now() : null;
  },
  tick() {
    this.start(this.seconds());
  },
  seconds() {
    return this.total + (this.since === null ? 0 : (performance.now() - this.since) / 1000);
  },
};

// -- showing things

// Fill the middle of the page; its heading takes the focus, so that it is read out.
function show(kind, ...children) {
  byId("task").dataset.kind = kind;
  byId("task").inert = false; // what was being saved is gone
  byId("task").replaceChildren(...children);
  scrollTo(0, 0);
  byId("task").querySelector("h1").focus({ preventScroll: true });
}

const heading = (title) => element("h1", { tabindex: "-1" }, title);

function showMessage(title, words, ...more) {
  current = null;
  show("message", element("div", { class: "message" }, heading(title), element("p", {}, words), ...more));
}

function showProgress({ answered, skipped, left }) {
  byId("progress-bar").max = Math.max(answered + skipped + left, 1);
  byId("progress-bar").value = answered + skipped;
  byId("progress-text").textContent = `${answered} done${skipped ? `, ${skipped} skipped` : ""}, ${left} left`;
  byId("undo").disabled = answered + skipped === 0;
}

const showSaved = (words) => (byId("saved").textContent = words);
const showProblem = (words) => (byId("problem").textContent = words);
const showWaiting = () => showProblem("The server cannot be reached. Trying again; nothing is lost.");

function showTask(task) {
  const kind = KINDS[task.kind];
  const form = new kind.form(task, settings, changed);
  const note = element("textarea", { id: "note", rows: "2", dir: "auto", maxlength: String(settings.max_note) });
  note.value = task.draft?.note ?? "";
  note.addEventListener("input", changed);
  const children = [heading(kind.title)];
  if (task.shown.instruction) children.push(textBlock(task.shown.instruction, "Instruction"));
  if (task.shown.prompt !== null) children.push(promptBlock(task.shown.prompt));
  const more = element("details", { class: "note" }, element("summary", {}, "Note"), element("label", { class: "hidden-text", for: "note" }, "Note"), note);
  more.open = note.value !== "";
  show(task.kind, ...children, form.node, more);
  current = { task, form, note };
  stopwatch.start(task.seconds);
  showSaved(task.draft ? "Draft restored" : "");
}

function promptBlock(prompt) {
  const turns = typeof prompt === "string" ? [textBlock(prompt, "Prompt")] : prompt.map(turnBlock);
  return element("section", { class: "prompt", "aria-labelledby": "prompt-title" }, element("h2", { id: "prompt-title" }, "Prompt"), ...turns);
}

function turnBlock({ role, content }) {
  return element("div", { class: `turn ${role}` }, element("h3", {}, ROLES[role]), textBlock(content, ROLES[role]));
}

function showDone() {
  showSaved("");
  showMessage(
    "Nothing left for you",
    "Thank you. There may be more later: this page looks when you come back to it. Your last answer can still be undone.",
    button("Look for more", { class: "primary" }, () => exclusively(next)),
  );
  byId("task").dataset.kind = "done"; // until something else is shown
}

// -- saving

const content = () => ({ ...current.form.content(), note: current.note.value });

function changed() {
  showProblem("");
  showSaved("…");
  clearTimeout(draftTimer);
  draftTimer = setTimeout(saveDraft, DRAFT_DELAY);
}

// Drafts go one after another, so that an older one never overwrites a newer one.
function saveDraft(keepalive = false) {
  clearTimeout(draftTimer);
  draftTimer = 0;
  const of = current;
  if (!of || busy) return;
  draftUnderWay = draftUnderWay.then(async () => {
    if (current !== of) return;
    try {
      await call("draft", { task: of.task.number, draft: content(), seconds: stopwatch.seconds() }, keepalive);
      if (!draftTimer) showSaved("Draft saved");
    } catch (error) {
      if (error instanceof ApiError && error.status < 500) fail(error);
      else {
        showSaved("Draft not saved");
        draftTimer ||= setTimeout(saveDraft, 3000);
      }
    }
  });
}

async function next() {
  take(await callUntilHeard("next", {}, showWaiting));
}

// Once, when somebody comes back to the page: one that nobody looks at would keep a task from the others.
function lookAgain() {
  if (byId("task").dataset.kind !== "done" || document.visibilityState !== "visible") return;
  exclusively(async () => {
    try {
      take(await call("next"));
    } catch (error) {
      if (error instanceof ApiError && error.status < 500) throw error;
      // The server is away, as between the parts of a round; the page looks again the next time.
    }
  });
}

function take(answer) {
  showProblem("");
  byId("actions").hidden = false;
  showProgress(answer.progress);
  byId("skip").disabled = byId("save").disabled = answer.task === null;
  if (answer.task === null) showDone();
  else showTask(answer.task);
}

// One thing at a time: a second click while something is saved does nothing.
async function exclusively(action) {
  if (busy) return;
  busy = true;
  byId("task").inert = true; // what is being saved is not changed meanwhile
  try {
    await draftUnderWay;
    await action();
  } catch (error) {
    fail(error);
  } finally {
    busy = false;
    byId("task").inert = false;
  }
}

async function finish(name, body) {
  clearTimeout(draftTimer);
  const event = { key: newKey(), task: current.task.number, seconds: stopwatch.seconds(), ...body };
  try {
    await callUntilHeard(name, event, showWaiting);
    announce(name === "skip" ? "Skipped." : "Saved.");
  } catch (error) {
    if (!["conflict", "not_given"].includes(error.code)) throw error;
    announce("This task was done in another tab.");
  }
  await next();
}

function save() {
  if (!current) return;
  const missing = current.form.missing();
  if (missing) {
    showProblem(missing.words);
    missing.target.focus();
    return;
  }
  exclusively(() => finish("answer", { answer: content() }));
}

function undo() {
  if (byId("undo").disabled) return;
  if (draftTimer) saveDraft();
  exclusively(async () => {
    await callUntilHeard("undo", { key: newKey() }, showWaiting);
    await next();
    announce("The last task is open again.");
  });
}

function fail(error) {
  if (error instanceof ApiError && error.status === 401) {
    byId("actions").hidden = true;
    showMessage("This link is not valid", "Open the personal link that you were given, or ask for a new one.");
  } else if (error instanceof ApiError) {
    showProblem(error.message);
  } else {
    throw error;
  }
}

// -- dialogs and keys

function openSkip() {
  if (!current || busy) return;
  byId("skip-form").reset();
  byId("skip-problem").textContent = "";
  byId("skip-dialog").showModal();
}

function submitSkip(event) {
  event.preventDefault();
  const reason = byId("skip-form").elements.reason.value;
  const note = byId("skip-note").value;
  if (!reason || (reason === "other" && !note.trim())) {
    byId("skip-problem").textContent = reason ? "Say in the note what the reason is." : "Choose a reason.";
    return;
  }
  byId("skip-dialog").close();
  exclusively(() => finish("skip", { skip: { reason, note } }));
}

function onKey(event) {
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    save();
    return;
  }
  const typing = event.target.matches("textarea, input[type=text]");
  if (typing || event.ctrlKey || event.altKey || event.metaKey || !byId("letters").checked) return;
  const keys = {
    "?": () => byId("help").showModal(),
    g: () => settings?.guidelines.length && byId("guidelines").showModal(),
    s: openSkip,
    u: undo,
  };
  if (event.key in keys) keys[event.key]();
  else if (!current?.form.key(event)) return;
  event.preventDefault();
}

function connectPage() {
  byId("save").addEventListener("click", save);
  byId("undo").addEventListener("click", undo);
  byId("skip").addEventListener("click", openSkip);
  byId("skip-cancel").addEventListener("click", () => byId("skip-dialog").close());
  byId("skip-form").addEventListener("submit", submitSkip);
  byId("help-button").addEventListener("click", () => byId("help").showModal());
  byId("guidelines-button").addEventListener("click", () => byId("guidelines").showModal());
  byId("letters").checked = localStorage.getItem("letters") !== "off";
  byId("letters").addEventListener("change", (event) => {
    localStorage.setItem("letters", event.target.checked ? "on" : "off");
  });
  document.addEventListener("keydown", onKey);
  document.addEventListener("visibilitychange", () => {
    stopwatch.tick();
    if (document.visibilityState === "hidden" && draftTimer) saveDraft(true);
    lookAgain();
  });
  addEventListener("focus", lookAgain); // of a window that was in view all the time
  onNewToken(() => location.reload());
}

async function start() {
  connectPage();
  if (!takeToken()) {
    showMessage("Labelling", "Open the personal link that you were given.");
    return;
  }
  settings = await callUntilHeard("hello", {}, showWaiting);
  document.title = `Labelling: ${settings.labeler}`;
  byId("labeler").textContent = settings.labeler;
  byId("guidelines-button").hidden = !settings.guidelines.length;
  byId("guidelines-text").replaceChildren(...tree(settings.guidelines));
  byId("skip-note").maxLength = settings.max_note;
  for (const [reason, label] of Object.entries(settings.skip_reasons)) {
    const input = element("input", { type: "radio", name: "reason", value: reason });
    byId("skip-reasons").append(element("label", { class: "check" }, input, " ", label));
  }
  await next();
}

exclusively(start);
