// Read a chunk of an answer: text, reasoning, images, the pieces of tool calls, sources. Plain functions: no document,
// no network. Services write the same contents in many shapes; an unknown shape gives nothing.

const DEEPEST = 6; // a part may hold a list of parts, as thinking does
const PICTURE = /^data:image\/(png|jpeg|webp|gif|avif);base64,/i;

/** Add one chunk of the upstream to a turn. */
export function take(turn, chunk) {
  const choice = list(chunk?.choices)[0];
  const delta = [choice?.delta, choice?.message].find((said) => said && Object.keys(said).length);
  if (!delta) return;
  const said = { text: "", reasoning: "", images: [] };
  add(said, delta.content);
  add(said, delta.refusal);
  if (words(delta.refusal) || list(delta.content).some((part) => part?.type === "refusal")) turn.refused = true;
  for (const image of list(delta.images)) add(said, image);
  turn.text += said.text;
  turn.reasoning += said.reasoning + reasoning(delta);
  if (list(delta.reasoning_details).some((detail) => detail?.type === "reasoning.encrypted")) turn.encrypted = true;
  for (const url of said.images) picture(turn, url);
  for (const call of list(delta.tool_calls)) {
    const known = (turn.tools[Number(call?.index ?? 0)] ??= { name: "", arguments: "" });
    known.name ||= words(call?.function?.name);
    known.arguments += words(call?.function?.arguments);
  }
  for (const annotation of list(delta.annotations)) {
    const cited = annotation?.url_citation;
    if (/^https?:/.test(cited?.url)) turn.sources.push({ url: cited.url, title: words(cited.title) || cited.url });
  }
}

/** Add a content: a text, a part with a type, or a list of both. */
function add(said, content, kind = "text", depth = 0) {
  if (typeof content === "string") said[kind] += content;
  else if (depth > DEEPEST || !content) return;
  else if (Array.isArray(content)) content.forEach((part) => add(said, part, kind, depth + 1));
  else {
    switch (content.type) {
      case "thinking":
      case "reasoning":
        return add(said, content.thinking || content.reasoning || content.text, "reasoning", depth + 1);
      case "refusal":
        return add(said, content.refusal, kind, depth + 1);
      case "image":
      case "image_url":
      case "output_image":
        return void said.images.push(words(content.image_url?.url ?? content.image_url));
      default:
        add(said, content.text, kind, depth + 1);
    }
  }
}

/** The same thoughts may be there under several names: the first name with contents counts. */
function reasoning(delta) {
  for (const thoughts of [delta.reasoning, delta.reasoning_content]) {
    const said = { text: "", reasoning: "", images: [] };
    add(said, thoughts, "reasoning");
    if (said.reasoning) return said.reasoning;
  }
  return list(delta.reasoning_details).map((detail) => words(detail?.text) + words(detail?.summary)).join("");
}

/** Show an image that is in the chunk, and link one that has an address: the page loads nothing. */
function picture(turn, url) {
  if (PICTURE.test(url)) (turn.images ??= []).push(url);
  else if (/^https?:/.test(url)) turn.sources.push({ url, title: "Image" });
  else turn.text += "[image]";
}

const list = (value) => (Array.isArray(value) ? value : []);
const words = (value) => (typeof value === "string" ? value : "");
