// A chat with the Vercel AI SDK. Its useChat speaks with the broker, and no server of its own is needed.
//
//     npm install && VITE_BROKER=https://broker.example npm run dev

import { useChat } from "@ai-sdk/react";
import { lastAssistantMessageIsCompleteWithToolCalls, type UIMessage } from "ai";
import { StrictMode, useEffect, useState } from "react";
import { createRoot } from "react-dom/client";
import { BrokerChatTransport, type BrokerMetadata } from "session-broker-client/ai-sdk";

const tools = [
  {
    type: "function",
    function: {
      name: "local_time",
      description: "The time at the user's place",
      parameters: { type: "object", properties: { city: { type: "string" } } },
    },
  },
];

const transport = new BrokerChatTransport<UIMessage<BrokerMetadata>>({
  base: import.meta.env.VITE_BROKER ?? "http://127.0.0.1:3000",
  model: new URLSearchParams(location.search).get("model") ?? undefined, // without one, the broker's default
  request: { tools },
  remember: sessionStorage,
});

function Chat() {
  const { messages, status, error, sendMessage, regenerate, stop, addToolOutput } = useChat<UIMessage<BrokerMetadata>>({
    id: "the-chat", // the same after a reload
    messages: JSON.parse(sessionStorage.getItem("messages") ?? "[]"),
    transport,
    resume: true,
    throttle: 50, // ms between two renders; models are faster than that
    sendAutomaticallyWhen: lastAssistantMessageIsCompleteWithToolCalls,
    onToolCall({ toolCall: { toolName, toolCallId } }) {
      void addToolOutput({ tool: toolName, toolCallId, output: new Date().toLocaleTimeString() });
    },
  });
  useEffect(() => sessionStorage.setItem("messages", JSON.stringify(messages)), [messages]);
  const [text, setText] = useState("");
  const busy = status === "submitted" || status === "streaming";

  return (
    <main>
      {messages.map(({ id, role, parts, metadata }) => (
        <article key={id} className={role}>
          {parts.map((part, n) => {
            if (part.type === "text") return <p key={n}>{part.text}</p>;
            if (part.type === "reasoning") return <details key={n}>{part.text}</details>;
            if (part.type === "source-url") return <a key={n} href={part.url}>{part.title}</a>;
            if (part.type === "file") return <img key={n} src={part.url} alt="" />;
            if ("toolCallId" in part) return <code key={n}>{JSON.stringify([part.type, part.state, part.input])}</code>;
            return null;
          })}
          {metadata?.cost != null && <small>{metadata.cost.toFixed(6)} USD</small>}
        </article>
      ))}
      <p role="status">{busy && status}</p>
      {error && <p role="alert">{error.message} <button onClick={() => void regenerate()}>Again</button></p>}
      <form onSubmit={(event) => { event.preventDefault(); void sendMessage({ text }); setText(""); }}>
        <input value={text} onChange={(event) => setText(event.target.value)} placeholder="Ask something" />
        {busy ? <button key="stop" type="button" onClick={() => void stop()}>Stop</button> : <button key="send">Send</button>}
      </form>
    </main>
  );
}

createRoot(document.getElementById("root")!).render(<StrictMode><Chat /></StrictMode>);
