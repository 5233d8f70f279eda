// Paints turns: seldom enough to be calm and cheap, and at the end of the page as long as the reader is there.

import { $ } from "./dom.js";
import { shownOf, turnView } from "./turn.js";

const PAINT_MS = 60; // between two paints of an answer: calm for the eye, and little work
const LOAD = 8; // a paint that takes t ms is not followed by another for LOAD × t
const FRAME_MS = 12; // of painting in a frame
const NEAR = 48; // pixels from the end that count as the end for a reader who comes back to it
const AT_END = 2; // pixels from the end that are nothing but rounding

/** Return `repaint(turn)`, `redraw()` of all turns, and `toEnd()`. */
export function startPainter({ turnsOf, followerOf, actions }) {
  const views = new Map(); // by turn id
  const pending = new Set();
  let painting = 0;
  let paintAt = 0;
  let following = true; // whether the reader is at the end
  let scrolled = 0; // where the page was when it last scrolled,
  let height = 0; // and how high it was

  /** Paint a turn soon, however many chunks come before it. */
  function repaint(turn) {
    pending.add(turn.id);
    painting ||= setTimeout(() => requestAnimationFrame(paint), Math.max(0, paintAt - performance.now()));
  }

  function paint() {
    painting = 0;
    const begun = performance.now();
    const turns = turnsOf().filter(({ id }) => pending.has(id));
    pending.clear();
    // A long conversation is painted from its end, in several frames.
    while (turns.length && performance.now() - begun < FRAME_MS) {
      const turn = turns.pop();
      if (!views.has(turn.id)) $("conversation").append(viewOf(turn).root);
      viewOf(turn).paint(followerOf(shownOf(turn)));
    }
    const now = performance.now();
    paintAt = turns.length ? now : now + Math.max(PAINT_MS, LOAD * (now - begun));
    turns.forEach(repaint);
  }

  function viewOf(turn) {
    if (!views.has(turn.id)) views.set(turn.id, { turn, ...turnView(turn, actions) });
    return views.get(turn.id);
  }

  /** Show the turns of now, in their order. Views of turns that are still there are kept. */
  function redraw() {
    const turns = turnsOf();
    for (const [id, { turn, root }] of views) {
      if (turns.includes(turn)) continue;
      root.remove();
      views.delete(id);
    }
    turns.forEach((turn, n) => {
      const there = $("conversation").children[n];
      const { root } = viewOf(turn);
      if (there !== root) $("conversation").insertBefore(root, there ?? null);
      repaint(turn);
    });
  }

  function scroll() {
    window.scrollTo({ top: document.documentElement.scrollHeight, behavior: "instant" });
    ({ scrollTop: scrolled, scrollHeight: height } = document.documentElement);
  }

  function toEnd() {
    following = true;
    scroll();
  }

  addEventListener("scroll", () => {
    const { scrollTop, clientHeight, scrollHeight } = document.documentElement;
    const left = scrollHeight - scrollTop - clientHeight;
    // Only the reader scrolls up, be it by a line. An answer that grows leaves the place as it is; one that shrinks moves
    // a reader at the end up with it.
    const isReader = left >= NEAR || (left > AT_END && scrollHeight >= height);
    if (scrollTop < scrolled && isReader) following = false;
    else if (left < NEAR) following = true;
    scrolled = scrollTop;
    height = scrollHeight;
    $("toEnd").hidden = following;
  }, { passive: true });
  const stay = () => following && scroll();
  new ResizeObserver(stay).observe($("conversation"));
  addEventListener("resize", stay); // the keyboard of a phone, too
  return { repaint, redraw, toEnd };
}
