// Tool calls come in pieces. Most services number the calls; some send whole calls without a number, some give all
// calls of an answer the number 0 and tell them apart by their ids.

import type { ToolCall } from "./client.js";

/** Return the place of the call to which a piece belongs; -1 where it starts a new one. */
export function placeOf(piece: ToolCall, calls: readonly ToolCall[]): number {
  const sameId = (call: ToolCall) => !piece.id || !call.id || piece.id === call.id;
  const sameIndex = (call: ToolCall) => piece.index == null || piece.index === call.index;
  return calls.findLastIndex((call) => sameIndex(call) && sameId(call));
}

/** Return a call with one more piece. */
export function joined(call: ToolCall, piece: ToolCall): ToolCall {
  const given = Object.entries(piece).filter(([, value]) => value != null && value !== "");
  return {
    ...call,
    ...Object.fromEntries(given),
    function: {
      name: call.function?.name || piece.function?.name || "",
      arguments: argumentsOf(call) + argumentsOf(piece),
    },
  };
}

/** The arguments as text; a few services send an object. */
export function argumentsOf(call: ToolCall): string {
  const given: unknown = call.function?.arguments ?? "";
  return typeof given === "string" ? given : JSON.stringify(given);
}
