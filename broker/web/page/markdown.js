// Markdown of a model, as elements. It is parsed by marked and cleaned by DOMPurify; markup in it stays text. Blocks that
// are complete are made once; only the last one is made again while it grows.

import "./vendor/purify.js";
import { Lexer, Marked } from "./vendor/marked.js";
import { decorateCode } from "./code.js";
import { make, patch } from "./dom.js";
import { mend } from "./mend.js";
import { TURN } from "./sentences.js";

const { DOMPurify } = globalThis;
const ADDRESS = /^(https?|mailto):/i;
const PICTURE = /^data:image\/(png|jpeg|webp|gif|avif);base64,/i;
const DEFINITION = /^ {0,3}\[[^\]\n]+\]:/m;
const CLEAN = {
  ALLOWED_TAGS: [
    "p", "br", "hr", "h3", "h4", "h5", "h6", "strong", "em", "del", "code", "pre", "blockquote", "ul", "ol", "li", "a", "img",
    "table", "thead", "tbody", "tr", "th", "td",
  ],
  ALLOWED_ATTR: ["href", "title", "class", "start", "align", "src", "alt"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

const escaped = (text) => text.replace(/[&<>"']/g, (mark) => `&#${mark.charCodeAt(0)};`);

const parser = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text, block }) => (block ? `<p>${escaped(text.trimEnd()).replaceAll("\n", "<br>")}</p>` : escaped(text)),
    heading({ tokens, depth }) {
      const level = Math.min(6, depth + 2); // below the headings of the page
      return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
    },
    link({ href, tokens, text }) {
      const inner = tokens ? this.parser.parseInline(tokens) : escaped(text);
      return ADDRESS.test(href) ? `<a href="${escaped(href)}">${inner}</a>` : inner;
    },
    // The page loads nothing from elsewhere: an image that has an address is a link.
    image({ href, text }) {
      if (PICTURE.test(href)) return `<img src="${escaped(href)}" alt="${escaped(text || TURN.image)}">`;
      return ADDRESS.test(href) ? `<a href="${escaped(href)}">${escaped(TURN.imageLink(text))}</a>` : escaped(text);
    },
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    code: ({ text, lang }) => `<pre><code class="language-${escaped(/^[\w+#.-]{1,30}/.exec(lang ?? "")?.[0] ?? "")}">${escaped(text)}\n</code></pre>`,
  },
});

/** Shows a text that only grows inside an element. */
export class MarkdownView {
  #root;
  #links = {}; // addresses that the text defines, for the blocks that follow
  #taken = 0; // characters of the text that were read
  #open = ""; // what is not in a complete block
  #settled = 0; // nodes of complete blocks
  #ended = false;

  constructor(root) {
    this.#root = root;
  }

  /** Show the text so far. After `ended` nothing is added. */
  write(text, ended) {
    if (this.#ended && this.#taken === text.length) return;
    if (text.length < this.#taken || (ended && DEFINITION.test(text))) this.#restart();
    this.#open += text.slice(this.#taken).replaceAll("\r", "");
    this.#taken = text.length;
    this.#ended = ended;
    const blocks = this.#blocks(this.#open);
    let last = blocks.length - 1;
    while (last > 0 && blocks[last].type === "space") last--;
    const done = ended ? blocks : blocks.slice(0, Math.max(0, last));
    if (done.length) {
      const nodes = this.#nodes(done, true);
      patch(this.#root, nodes, this.#settled);
      this.#settled += nodes.length;
      this.#open = this.#open.slice(done.reduce((sum, { raw }) => sum + raw.length, 0));
    }
    patch(this.#root, ended ? [] : this.#nodes(this.#blocks(mend(this.#open)), false), this.#settled);
  }

  #restart() {
    this.#taken = this.#settled = 0;
    this.#open = "";
  }

  #blocks(text) {
    const lexer = new Lexer(parser.defaults);
    lexer.tokens.links = this.#links;
    return lexer.lex(text);
  }

  #nodes(blocks, complete) {
    const fragment = DOMPurify.sanitize(parser.parser(blocks), CLEAN);
    decorate(fragment, complete);
    return [...fragment.childNodes].filter((node) => node.nodeType === Node.ELEMENT_NODE || node.data.trim());
  }
}

function decorate(fragment, complete) {
  for (const block of fragment.children) block.dir = "auto"; // what is in it follows: an inner `auto` would not count
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer";
  }
  for (const table of fragment.querySelectorAll("table")) {
    const frame = make("div", { className: "wide", tabIndex: 0, role: "group" }); // scrolls by itself, by keyboard too
    frame.ariaLabel = [...table.querySelectorAll("th")].map((cell) => cell.textContent).join(", ") || "—";
    table.replaceWith(frame);
    frame.append(table);
  }
  for (const code of fragment.querySelectorAll("pre > code")) decorateCode(code, complete);
}
