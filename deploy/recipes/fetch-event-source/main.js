// An answer with @microsoft/fetch-event-source, for pages that have it already. It is no EventSource: unlike one, it
// takes the end of a connection for the end of the answer, and closes its connection while the page is hidden.

import { fetchEventSource } from "@microsoft/fetch-event-source";

export async function ask(base, request, show) {
  const prepared = await fetch(`${base}/prepare`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(request),
  });
  const body = await prepared.json();
  if (!prepared.ok) throw new Error(body.error.message);
  let done, failure;
  await fetchEventSource(`${base}/stream/${body.sessionId}?events=token`, {
    openWhenHidden: true, // hidden for longer than BROKER_DISCONNECT_GRACE, the page would have left its answer
    onmessage({ event, data }) {
      if (event === "token") show(JSON.parse(data).text ?? "");
      if (event === "done") done = JSON.parse(data);
      if (event === "error" && JSON.parse(data).final) failure = JSON.parse(data);
    },
    onclose() {
      if (!done && !failure) throw new Error("The connection was cut."); // it connects again where it was
    },
    onerror() {}, // connect again after any loss, a proxy's 502 too
  });
  if (failure) throw new Error(failure.message);
  return done;
}

const parameters = new URLSearchParams(location.search);
const question = parameters.get("ask");
if (question) {
  const answer = document.querySelector("#answer");
  const request = { model: parameters.get("model"), messages: [{ role: "user", content: question }] };
  const { cost } = await ask(parameters.get("base"), request, (text) => answer.append(text));
  document.title = `${cost} USD`;
}
