"""The text of the models, and how it is cut into tokens.

The passages are about what their readers are probably building. Each is Markdown with several paragraphs, a list and a
piece of code, so that a page has something to render.
"""

from __future__ import annotations

import re
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_TOKEN = re.compile(r"\s*(?:\w{1,7}|[^\w\s]{1,3})|\s+")

EVENT_STREAMS = """\
An event stream is an ordinary HTTP answer that is in no hurry to end. The server sends its headers, keeps the line \
open, and writes a few lines of text whenever it has something to say. The browser reads them as they come and hands \
each event to the page.

A line that begins with `data:` carries the payload, and a blank line says that the event is complete. Three more \
kinds of line are worth knowing:

- `id:` names the event. After a lost connection the browser sends the last one it saw, so that the server can go on \
from there.
- `retry:` says how many milliseconds to wait before connecting again.
- A line that starts with a colon is a comment. No script ever sees it; it keeps impatient proxies from closing a \
quiet line.

On the page it takes a few lines:

```js
const source = new EventSource("/stream/42");
source.addEventListener("chunk", (event) => {
  output.textContent += JSON.parse(event.data).text;
});
```

The part that is most often forgotten is the end. A stream that simply closes looks like an accident to the browser, \
so it connects again. Send an event that says goodbye, and close the source when it arrives."""

BROKEN_STREAMS = """\
Streams rarely break with a bang. Somebody walks into a lift, a laptop is shut, a proxy decides that a minute of \
silence means nobody is there. Neither end hears of it at once: the sender writes into a buffer that nobody empties, \
and the receiver waits for bytes that will never come.

When an answer stops halfway, look for the cause in this order:

1. A proxy that buffers. It holds the small pieces back until it has a large one, so everything arrives in one lump.
2. A timeout along the way that counts silence. A comment every fifteen seconds is enough to please it.
3. A restart of the server, which is a break like any other to those who were connected.
4. The network of the reader, about which you can do nothing but come back well.

Coming back well means remembering where you were:

```python
for event in follow(stream, after=last_id):
    show(event.data)
    last_id = event.id
```

Notice that the place is remembered after the piece was shown. The other way round, a crash between the two lines \
loses a piece in silence, and a reader who notices a hole will not trust the rest either."""

ERROR_MESSAGES = """\
A good error message is read by somebody who was doing something else. They did not come to learn how your system \
works; they want to know whether their work is lost, and what to do next. Answer these two questions and you have \
done better than most.

Before you ship a message, hold it against this list:

- Does it say what happened, in words that the reader would use?
- Does it say whether trying again can help, and when?
- Does it keep quiet about keys, paths and the names of your machines?
- Does it have a code that a program can compare, so that nobody has to search the sentence?

In JSON the two audiences can share one object:

```json
{"error": {"code": "rate_limited", "message": "Too many requests; try again in 20 seconds.", "retryAfter": 20}}
```

The code is a promise and stays for years, while the sentence may be improved on any afternoon. And if you catch \
yourself writing that something went wrong, stop: the reader knows. Say what, or say where to ask."""

TOKENS = """\
A language model does not write letters, and it does not quite write words. It writes tokens: short runs of characters \
that were common in the texts it learned from. A frequent word is a single token, a rare one falls apart into several, \
and a space usually travels with the word behind it.

For a page that shows an answer as it grows, this has consequences:

- The pieces do not end where words end. Append them as they are, without a space between.
- A piece may stop in the middle of a Markdown mark, so what looks like emphasis may turn into a list a moment later.
- A flag, or a face with a skin colour, is made of several characters and can be torn in two for an instant.

The simplest way to cope is to keep the whole text and render it again for each frame, not for each token:

```js
let text = "";
let waiting = false;
function add(piece) {
  text += piece;
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; render(text); });
}
```

At thirty tokens a second nobody can tell the difference, and the fan of the laptop stays quiet."""

WAITING = """\
People forgive a slow answer more easily than a silent one. What wears them down is not the third second but the \
doubt: did my click arrive, is anybody there, should I press the button again? A page can settle all of this before \
the first word.

What helps, roughly in the order in which it is needed:

1. React to the click at once, even if only by greying the button out.
2. Show the question in its place. It proves that nothing was lost.
3. After a second, show that something is at work, with a mark that moves.
4. After ten, say so in words, and offer a way out.

The way out matters most. Stopping must be as easy as asking, and it must really stop the work:

```js
stop.addEventListener("click", () => {
  source.close();
  fetch(`/stream/${sessionId}`, { method: "DELETE" });
});
```

Keep what has been written so far when somebody stops. Half an answer is often all they needed, and taking it away \
would punish them for being quick."""

PASSAGES = (EVENT_STREAMS, BROKEN_STREAMS, ERROR_MESSAGES, TOKENS, WAITING)

THOUGHTS = """\
Who is asking? Probably somebody with an editor open on one side and this answer on the other, so they can try what \
I say right away. That speaks for one concrete example rather than three careful ones.

What could be misread? The difference between a line that broke and an answer that ended. I should name it early and \
come back to it in the last paragraph. A list for what belongs side by side, prose for the rest. Short enough to be \
read while it is being written. Good, I have what I need."""

WRITINGS_OF_THE_WORLD = """\
Every character below takes more than one byte, and this stream tears each event apart in the middle of one.

- Accents, composed and combined: café and cafe\u0301, Ångström, a\u0308o\u0308u\u0308, Việt Nam
- Greek and Cyrillic: Καλημέρα κόσμε · Добрый день
- Right to left: \u202bשלום עולם\u202c · \u202bمرحبا بالعالم\u202c · and back again
- Chinese, Japanese, Korean: 你好，世界。 こんにちは、世界。 안녕하세요, 세계.
- Marks above and below: नमस्ते दुनिया · สวัสดีชาวโลก
- Emoji of one and of many parts: 🙂 👍🏽 👩\u200d👩\u200d👧\u200d👦 🏳\ufe0f\u200d🌈 🇩🇪🇯🇵
- Beyond the basic plane: 𝕊𝕠 𝔴𝔢𝔦𝔱 · 𠮷野家 · 𓂀
- Line ends that are none to an event stream: here\u2028and here\u0085and that was it.

Decode each network read by itself and this text is full of question marks; decode the stream and it has none."""  # noqa: RUF001 - look-alikes are the point


def passage_for(question: str) -> str:
    """Return the passage that answers this question: always the same for the same question."""
    digest = blake2b(question.encode(), digest_size=8).digest()
    return PASSAGES[int.from_bytes(digest, "big") % len(PASSAGES)]


def opening_of(text: str) -> str:
    """Return the first paragraph."""
    return text.partition("\n\n")[0]


def tokens_of(text: str) -> Iterator[str]:
    """Yield the text in pieces of about the length of a model's tokens. Joined, they are the text."""
    return (found.group() for found in _TOKEN.finditer(text))
