// A block of code: its language, colours, and a button that copies it. The highlighter is loaded with the first block.

import { copy, make, patch } from "./dom.js";
import { TURN } from "./sentences.js";

const LARGEST = 60_000; // of a block that is coloured
const LARGEST_OPEN = 4_000; // of one that is still written, and coloured again each time
const PLAIN = { ALLOWED_TAGS: ["span"], ALLOWED_ATTR: ["class"], ALLOW_DATA_ATTR: false, ALLOW_ARIA_ATTR: false, RETURN_DOM_FRAGMENT: true };

let highlighter = null;
let loading = null;

/** Put a bar above a block of code that DOMPurify has cleaned. */
export function decorateCode(code, complete) {
  const language = /^language-(.+)/.exec(code.className)?.[1] ?? "";
  const frame = make("div", { className: "code" });
  const bar = make("div", { className: "bar" },
    make("span", {}, language || TURN.code),
    make("button", { type: "button", className: "quiet copyCode", textContent: TURN.copy }));
  const text = code.parentElement;
  text.replaceWith(frame);
  frame.append(bar, text);
  text.tabIndex = 0; // it scrolls by itself, by keyboard too
  text.dir = "ltr";
  text.role = "group";
  text.ariaLabel = language || TURN.code;
  if (code.textContent.length < (complete ? LARGEST : LARGEST_OPEN)) colour(code, language);
}

function colour(code, language) {
  if (!highlighter) {
    loading ??= import("./vendor/highlight.js").then((module) => {
      highlighter = module.default;
      for (const shown of document.querySelectorAll(".code code")) colour(shown, /^language-(.+)/.exec(shown.className)?.[1]);
    }, () => {}); // without colours, code can be read as well
    return;
  }
  if (!highlighter.getLanguage(language ?? "") || code.textContent.length > LARGEST) return;
  const { value } = highlighter.highlight(code.textContent, { language, ignoreIllegals: true });
  patch(code, [...globalThis.DOMPurify.sanitize(value, PLAIN).childNodes]);
}

document.addEventListener("click", async ({ target }) => {
  if (!target.classList?.contains("copyCode")) return;
  if (!(await copy(target.closest(".code").querySelector("code").textContent))) return;
  target.textContent = TURN.copied;
  setTimeout(() => (target.textContent = TURN.copy), 1500);
});
