// Small helpers for the document. Text is always inserted as text.

export const $ = (id) => document.getElementById(id);

/** Make an element: properties, then children. A property with a dash, `role` and `dir` are set as attributes. */
export function make(name, properties = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.includes("-") || key === "role") element.setAttribute(key, value);
    else element[key] = value;
  }
  element.append(...children);
  return element;
}

/** Make a button with a text. */
export function button(text, className, act) {
  const made = make("button", { type: "button", className, textContent: text });
  made.addEventListener("click", act);
  return made;
}

/** Show a text; an empty one hides its element. What is shown already is not touched. */
export function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
  element.hidden = !text;
}

/** Put the sentences into the document. */
export function translate(table) {
  for (const element of document.querySelectorAll("[data-say]")) element.textContent = table[element.dataset.say];
  for (const element of document.querySelectorAll("[data-label]")) element.ariaLabel = table[element.dataset.label];
  for (const element of document.querySelectorAll("[data-hint]")) element.placeholder = table[element.dataset.hint];
}

/** Make the nodes of `parent` from `at` on equal to `wanted`, keeping those that are: nothing flickers, a selection stays. */
export function patch(parent, wanted, at = 0) {
  const present = [...parent.childNodes].slice(at);
  wanted.forEach((node, n) => {
    const old = present[n];
    if (!old) parent.append(node);
    else if (old.nodeType === Node.TEXT_NODE && node.nodeType === Node.TEXT_NODE) write(old, node.data);
    else if (old.nodeName === node.nodeName && sameAttributes(old, node)) patch(old, [...node.childNodes]);
    else old.replaceWith(node);
  });
  for (const old of present.slice(wanted.length)) old.remove();
}

function write(node, text) {
  if (text.startsWith(node.data)) node.appendData(text.slice(node.length));
  else node.data = text;
}

function sameAttributes(one, other) {
  return one.attributes?.length === other.attributes?.length
    && [...(one.attributes ?? [])].every(({ name, value }) => other.getAttribute(name) === value);
}

/** Copy a text. Returns False where the browser does not allow it. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const box = make("textarea", { value: text, className: "unseen" }); // where the page is not on a secure address
    document.body.append(box);
    box.select();
    const copied = document.execCommand("copy");
    box.remove();
    return copied;
  }
}
