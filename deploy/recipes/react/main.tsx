// A chat with React: questions and answers, waiting, stopping, errors, and all of it again after a reload.
//
//     npm install && VITE_BROKER=https://broker.example npm run dev

import { StrictMode, useState } from "react";
import { createRoot } from "react-dom/client";
import { useChat } from "session-broker-client/react";

const base = import.meta.env.VITE_BROKER ?? "http://127.0.0.1:3000";
const model = new URLSearchParams(location.search).get("model") ?? undefined; // without one, the broker's default

function Chat() {
  const { messages, state, place, error, busy, send, stop, retry } = useChat({ base, model, remember: sessionStorage });
  const [text, setText] = useState("");

  return (
    <main>
      {messages.map(({ id, role, content, reasoning, result }) => (
        <article key={id} className={role}>
          {reasoning && <details>{reasoning}</details>}
          <p>{String(content)}</p>
          {result?.cost != null && <small>{result.cost.toFixed(6)} USD</small>}
        </article>
      ))}
      <p role="status">{state === "queued" ? `number ${place?.position} of ${place?.of} in line` : busy && state}</p>
      {error && <p role="alert">{error.message} <button onClick={retry}>Again</button></p>}
      <form onSubmit={(event) => { event.preventDefault(); send(text); setText(""); }}>
        <input value={text} onChange={(event) => setText(event.target.value)} placeholder="Ask something" />
        {busy ? <button key="stop" type="button" onClick={stop}>Stop</button> : <button key="send">Send</button>}
      </form>
    </main>
  );
}

createRoot(document.getElementById("root")!).render(<StrictMode><Chat /></StrictMode>);
