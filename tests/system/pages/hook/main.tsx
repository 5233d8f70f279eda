// A component that asks in an effect, which React's StrictMode runs twice, and that the test can unmount.

import { Profiler, StrictMode, useEffect } from "react";
import { createRoot } from "react-dom/client";
import { useChat, type UseChat, type UseChatOptions } from "session-broker-client/react";

declare global {
  interface Window {
    chat: UseChat;
    renders: number;
    mount(question: string, options?: UseChatOptions): void;
    unmount(): void;
  }
}

const base = import.meta.env.VITE_BROKER;

function Asking({ question, options }: { question: string; options: UseChatOptions }) {
  const chat = useChat({ base, model: "rehearsal/echo", ...options });
  window.chat = chat;
  useEffect(() => {
    if (question) chat.send(question);
  }, []);
  return <p>{chat.messages.map(({ content }) => String(content)).join("\n")}</p>;
}

window.renders = 0;
window.mount = (question, options = {}) => {
  const root = createRoot(document.getElementById("root")!);
  window.unmount = () => root.unmount();
  root.render(
    <StrictMode>
      <Profiler id="asking" onRender={() => window.renders++}>
        <Asking question={question} options={options} />
      </Profiler>
    </StrictMode>,
  );
};
