// Every sentence of the page, and nothing else: a translation is a copy of this file. A function gets the figures as
// texts. No document, no network.

export const LANGUAGE = "en";

/** Texts of the document, by the name in `data-say` (text), `data-label` (accessible name), `data-hint` (placeholder). */
export const SAY = {
  skip: "Skip to the message",
  title: "Session Broker",
  conversations: "Conversations",
  conversation: "Conversation",
  menu: "Conversations",
  newChat: "New chat",
  noConversations: "Your conversations are kept here, in this browser only.",
  export: "Export",
  settings: "Settings",
  shortcuts: "Shortcuts",
  lead: "What would you like to ask?",
  leadMore: "The conversation is kept in this browser. Lose the connection, reload or open another tab, and the answer goes on where it was.",
  rehearsal: "Rehearsal",
  rehearsalMore: "No model is asked and nothing is paid. The models are a menu of what can go wrong:",
  rehearsalList: "See them all",
  message: "Message",
  messageHint: "Write a message",
  send: "Send",
  stop: "Stop",
  toEnd: "To the end",
  editing: "You are editing an earlier message.",
  cancel: "Cancel",
  close: "Close",
  askKey: "This broker asks for an access key.",
  useKey: "Use key",
  models: "Models",
  searchModels: "Search models",
  freeOnly: "Free only",
  sortBy: "Sort by",
  sortGiven: "Order of the list",
  sortPrice: "Price",
  sortContext: "Context",
  pricesAre: "Prices per million tokens",
  temperature: "Temperature",
  temperatureHelp: "0 to 2. Higher is more varied. Empty: the model's own.",
  maxTokens: "Longest answer, in tokens",
  maxTokensHelp: "Empty: as long as the broker allows.",
  effort: "Reasoning effort",
  effortDefault: "The model's own",
  effortNone: "None",
  effortLow: "Low",
  effortMedium: "Medium",
  effortHigh: "High",
  system: "System prompt",
  systemHelp: "Sent before each conversation.",
  reset: "Reset",
};

export const SHORTCUTS = [
  ["Enter", "Send the message"],
  ["Shift + Enter", "New line"],
  ["Escape", "Stop the answer, or close what is open"],
  ["Arrow up", "Edit the last message, in an empty box"],
  ["Ctrl + K", "Choose a model"],
  ["Ctrl + Shift + O", "New chat"],
  ["Ctrl + /", "This list"],
];

// ---- a turn --------------------------------------------------------------------------------------------------------

export const TURN = {
  you: "You",
  answer: "Answer",
  copy: "Copy",
  copied: "Copied",
  again: "Try again",
  otherModel: "Other model",
  edit: "Edit",
  delete: "Delete",
  continue: "Continue",
  key: "Enter a key",
  chooseModel: "Choose a model",
  newChat: "Start a new chat",
  stop: "Stop",
  previous: "Previous answer",
  next: "Next answer",
  refusal: "The model refuses.",
  encrypted: "The model's reasoning is encrypted and cannot be shown.",
  tools: "The model asks for a tool, which this page does not run:",
  toolName: (name) => name || "unnamed tool",
  sources: "Sources",
  image: "Image of the answer",
  imageLink: (alt) => `Image: ${alt || "open"}`,
  code: "Code",
  reasoning: "Reasoning",
  reasoned: (time) => `Reasoned for ${time}`,
  reasons: "Reasoning…",
  empty: "The model ended without a word.",
  details: "Details",
  of: (position, of) => `${position} of ${of}`,
};

export const UNDO = {
  turn: "The turn was deleted.",
  turns: (count) => (count === 1 ? "One later turn was removed." : `${count} later turns were removed.`),
  conversation: "The conversation was deleted.",
  undo: "Undo",
  deleteConversation: (title) => `Delete “${title}”`,
};

export const LIVE = {
  writing: "The answer is being written.",
  ended: (text) => `The answer is complete. ${text}`,
  failed: (sentence) => sentence,
};

// ---- what is going on ----------------------------------------------------------------------------------------------

export const STATUS = {
  preparing: "Sending…",
  connecting: "Waiting for the first word…",
  queued: (position, of) => `Waiting in line: number ${position} of ${of}. It goes on by itself as soon as there is room.`,
  room: "Waiting until there is room. It goes on by itself.",
  reconnecting: (times) => `Reconnecting${times > 1 ? `, the connection was lost ${times} times` : ""}… The answer goes on where it was.`,
  stalled: (time) => `Nothing has come for ${time}. You can wait, or stop.`,
  stopping: "Stopping…",
};

export const FINISH = {
  cancelled: "Stopped",
  length: "Cut off at the longest answer allowed",
  content_filter: "Held back by a content filter",
};

// ---- what goes wrong: one sentence, one thing to do ----------------------------------------------------------------

export const WAIT = (time) => `You can try again in ${time}.`;

const again = "again";
const go_on = "continue";
const model = "model";
const BROKEN = ["The answer was broken off.", go_on];
const AWAY = ["The model's service cannot be reached right now.", again];

/** By code: the sentence, and the name of what helps. A code that is not here is told in the broker's own words. */
export const PROBLEMS = {
  unreachable: ["The broker cannot be reached. Check your connection.", again],
  unauthorized: ["This broker asks for an access key.", "key"],
  no_model: ["No model is chosen.", model],
  not_sent: ["The page was closed before this message was sent.", again],
  origin_not_allowed: ["This broker does not serve the address of this page.", again],
  host_not_allowed: ["This broker does not serve the address of this page.", again],
  model_not_allowed: ["This broker does not offer this model.", model],
  session_not_found: ["The broker no longer has this answer.", again],
  session_expired: ["The broker no longer has the rest of this answer.", go_on],
  replay_gap: ["A part of this answer was lost on the way.", again],
  body_too_large: ["The conversation is too large for this broker.", "newChat"],
  prompt_too_long: ["The conversation is too long for this model.", "newChat"],
  rate_limited: ["You have asked a lot in a short time.", again],
  budget_exceeded: ["The budget is used up. A cheaper model may still fit.", model],
  too_many_streams: ["Too many answers are being written at once.", again],
  internal_error: ["The broker made a mistake.", again],
  upstream_unauthorized: ["The model's service does not accept the broker's key. Its operator has to look at it.", model],
  upstream_payment_required: ["The broker's account has no credit. A free model may still answer.", model],
  upstream_rate_limited: ["The model is asked by too many right now.", again],
  upstream_moderated: ["The model's service does not allow this question.", "edit"],
  upstream_rejected: ["The model's service did not accept this request.", model],
  upstream_unavailable: AWAY,
  upstream_timeout: ["The model did not answer in time.", again],
  upstream_interrupted: BROKEN,
  upstream_error: ["The model's service had an error.", again],
  upstream_invalid: ["The model's service answered something that cannot be read.", model],
  response_too_large: ["The answer became too large.", again],
  deadline_exceeded: ["The answer took too long.", go_on],
  abandoned: ["The answer ended because nobody watched it.", go_on],
  worker_lost: BROKEN,
  server_shutdown: ["The broker was restarted, and the answer broken off.", go_on],
  store_unavailable: ["The broker cannot take requests right now.", again],
  draining: ["The broker is restarting.", again],
  overloaded: ["The broker is busy right now.", again],
};

// ---- figures -------------------------------------------------------------------------------------------------------

export const FIGURES = {
  free: "free",
  priceVaries: "price varies",
  price: (input, output) => `${input} in, ${output} out`,
  context: (tokens) => `${tokens} context`,
  about: (figure) => `about ${figure}`,
  under: (figure) => `under ${figure}`,
  costUnknown: "cost unknown",
  tokens: (input, output) => `${input} tokens in, ${output} out`,
  totalTokens: (count) => `${count} tokens`,
  firstWord: (time) => `first word after ${time}`,
  speed: (count) => `${count} tokens/s`,
  seconds: (count) => `${count} s`,
  minutes: (count) => `${count} min`,
  today: (money, count) => `Today: ${money}, ${count} ${count === "1" ? "answer" : "answers"}`,
  left: (what) => `Left today: ${what}`,
  leftOfMonth: (what) => `Left this month: ${what}`,
};

export const MODELS = {
  loading: "Loading models…",
  none: "Default model",
  noMatch: "No model matches.",
  away: "The list of models is not available; the broker's default model is used.",
  choose: (name) => `Model: ${name}`,
  count: (count) => (count === 1 ? "1 model" : `${count} models`),
};

export const EXPORT = {
  you: "You",
  fileName: "conversation",
};
