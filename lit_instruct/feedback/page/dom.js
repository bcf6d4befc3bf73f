// Building the page. Everything a labeler reads becomes a text node; nothing is ever parsed as HTML.

export const byId = (id) => document.getElementById(id);

// An element with attributes and children (elements or strings). A value of true sets an attribute, false leaves it out.
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) node.setAttribute(name, "");
    else if (value !== false) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

const LONG = 3000; // characters; longer texts scroll in a box of their own

// Text as somebody or some model wrote it: line breaks kept, its direction its own and kept from what stands around it.
// Control characters, which browsers do not show, are replaced by their pictures.
export function textBlock(text, label) {
  const shown = text.replace(/[\u0000-\u0008\u000b-\u001f\u007f]/g, (c) =>
    c === "\u007f" ? "\u2421" : String.fromCharCode(0x2400 + c.charCodeAt(0)),
  );
  const node = element("div", { class: "text", dir: "auto" }, shown);
  if (!text.trim()) node.replaceChildren(element("em", { class: "quiet" }, "(empty)"));
  if (text.length <= LONG) return node;
  node.classList.add("long");
  node.tabIndex = 0; // so that the arrow keys scroll it
  node.setAttribute("role", "region");
  node.setAttribute("aria-label", label);
  return node;
}

export function checkbox(label, checked, onChange, name = false) {
  const input = element("input", { type: "checkbox", name });
  input.checked = checked;
  input.addEventListener("change", () => onChange(input.checked));
  return element("label", { class: "check" }, input, " ", label);
}

export function button(label, attributes, onClick) {
  const node = element("button", { type: "button", ...attributes }, label);
  node.addEventListener("click", onClick);
  return node;
}

// Say something to screen readers. The same words twice are told twice, since the node is replaced.
export function announce(words) {
  byId("announcer").replaceChildren(element("p", {}, words));
}

// The guidelines, sent as {tag, children, href}: tags were chosen by the server, and are looked at again here.
const TAGS = new Set(
  "h1 h2 h3 h4 p ul ol li strong em code pre blockquote hr br a table thead tbody tr th td".split(" "),
);

export function tree(nodes) {
  return nodes.map((node) => {
    if (typeof node === "string") return node;
    const children = tree(node.children);
    if (!TAGS.has(node.tag)) return element("span", {}, ...children);
    if (node.tag !== "a") return element(node.tag, {}, ...children);
    const safe = /^(https?:\/\/|mailto:)/i.test(node.href);
    return element("a", safe ? { href: node.href, target: "_blank", rel: "noopener noreferrer" } : {}, ...children);
  });
}
