// Close what is still open in Markdown that is being written, so that half a mark is never shown as text and then taken
// back. Plain functions: no document.

const HALF_LINE = /^[ \t]*(?:(?:[-=*_+#>~`|]{1,6}|\d{1,9}[.)]?|[-*+]\s\[[ xX]?\]?|!\[?|\[)[ \t]*)?$/; // may still become anything
const TABLE_HEAD = /^ {0,3}\|.*(\n *\|?[-:| ]*)?$/;
const FENCE = /^ {0,3}(```|~~~)/;
const CHECKBOX = /^\s*[-*+]\s$/; // the bracket behind this
const LONGEST = 4000; // of the last paragraph; marks further apart are not paired

/** Return the last, unfinished block as it can be shown now. */
export function mend(block) {
  if (FENCE.test(block)) return block.replace(/\n[ ]{0,3}[`~]{1,2}$/, "");
  if (TABLE_HEAD.test(block)) return "";
  const shown = HALF_LINE.test(lastLine(block)) ? block.slice(0, Math.max(block.lastIndexOf("\n"), 0)) : block;
  const start = Math.max(shown.lastIndexOf("\n\n") + 1, shown.length - LONGEST, 0);
  return shown.slice(0, start) + mendLine(shown.slice(start));
}

// Expressions read one line only: on a whole block they could take a time that grows with its square.
const lastLine = (text) => text.slice(text.lastIndexOf("\n") + 1);

function mendLine(text) {
  const open = [];
  for (let at = 0; at < text.length; at++) {
    const mark = text[at];
    if (mark === "\\") at++;
    else if (mark === "`") {
      const ticks = /^`+/.exec(text.slice(at))[0];
      const end = text.indexOf(ticks, at + ticks.length);
      if (end < 0) return at + ticks.length < text.length ? closed(text + ticks, open) : closed(text.slice(0, at), open);
      at = end + ticks.length - 1;
    } else if (mark === "[") {
      const rest = text.slice(at);
      const half = /^\[([^\]\n]*)(\](\([^)\n]*)?)?$/.exec(rest);
      const before = text.slice(0, at);
      if (half && !CHECKBOX.test(lastLine(before))) return closed(before.replace(/!$/, "") + half[1], open);
    } else if (mark === "*" || mark === "_" || (mark === "~" && text[at + 1] === "~")) {
      const run = text.startsWith(mark + mark, at) ? mark + mark : mark;
      const before = text[at - 1] ?? " ";
      const after = text[at + run.length] ?? "";
      if (open.at(-1)?.run === run && /\S/.test(before)) open.pop();
      else if (/\S/.test(after) && (mark !== "_" || /[\s(["'*]/.test(before))) open.push({ run, at });
      else if (after === "" && at + run.length === text.length && /[\s(["'*]/.test(before)) return closed(text.slice(0, at), open);
      at += run.length - 1;
    }
  }
  return closed(text, open);
}

function closed(text, open) {
  const marks = open.map(({ run }) => run).reverse();
  if (!marks.length) return text;
  const last = open.at(-1);
  // A single mark that was meant to be two: `**bold*`.
  const whole = last.run.length === 2 && text.endsWith(last.run[0]) ? text.slice(0, -1) : text;
  const trimmed = whole.trimEnd();
  return trimmed + marks.join("") + whole.slice(trimmed.length);
}
