// Conversations in IndexedDB. A conversation and each answer are records of their own, so that two tabs that write in the
// same conversation write different records. Of one answer the state that is further wins: both tabs read the same events.

const NAME = `session-broker${location.pathname}`; // another broker of this origin has another path
const READS = 5; // of answers that change while they are read
const channel = typeof BroadcastChannel === "function" ? new BroadcastChannel(NAME) : null;

let opened = null;
let changes = 0; // of what there is, by this tab and others: a read that began before one does not have it

/** Return the database, or null where the browser has none, as in some private windows: then nothing is kept. */
function database() {
  opened ??= new Promise((resolve) => {
    let request;
    try {
      request = indexedDB.open(NAME, 1);
    } catch {
      return resolve(null);
    }
    request.onupgradeneeded = () => {
      request.result.createObjectStore("conversations", { keyPath: "id" });
      request.result.createObjectStore("answers", { keyPath: "id" }).createIndex("conversation", "conversation");
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = request.onblocked = () => resolve(null);
  });
  return opened;
}

/** Add or remove something. A read that begins after this call has it. */
function change(stores, act) {
  changes++;
  return transact(stores, "readwrite", act);
}

async function transact(stores, mode, act) {
  const open = await database();
  if (!open) return undefined;
  return new Promise((resolve) => {
    let result;
    const transaction = open.transaction(stores, mode);
    transaction.oncomplete = () => resolve(result);
    transaction.onerror = transaction.onabort = () => resolve(undefined); // full, for example: what was kept stays
    act(transaction, (value) => (result = value));
  });
}

const read = (store, ask) => transact([store], "readonly", (transaction, give) => {
  ask(transaction.objectStore(store)).onsuccess = ({ target }) => give(target.result);
});

/** Return all conversations, the latest first. */
export async function conversations() {
  const all = (await read("conversations", (store) => store.getAll())) ?? [];
  return all.sort((one, other) => other.updated - one.updated);
}

/** Return the answers of a conversation. Reads again if this or another tab added or removed any during the read. */
export async function answersOf(conversation) {
  for (let reads = 1; ; reads++) {
    const before = changes;
    const all = (await read("answers", (store) => store.index("conversation").getAll(conversation))) ?? [];
    if (changes === before || reads === READS) return all.sort((one, other) => one.at - other.at);
  }
}

/** Add a conversation and its answers, or add to them. */
export async function keep(conversation, answers) {
  await change(["conversations", "answers"], (transaction) => {
    transaction.objectStore("conversations").put(conversation);
    for (const answer of answers) transaction.objectStore("answers").put(answer);
  });
  tell(conversation.id);
}

/** Write how far an answer is, unless it was deleted or another tab is further. */
export async function progress(answer, isNews) {
  await transact(["answers"], "readwrite", (transaction) => {
    const store = transaction.objectStore("answers");
    store.get(answer.id).onsuccess = ({ target: { result: kept } }) => {
      if (kept && !isAhead(kept, answer)) store.put(answer);
    };
  });
  if (isNews) tell(answer.conversation);
}

const ended = (answer) => Boolean(answer.result || answer.problem);

function isAhead(kept, answer) {
  if (ended(kept) !== ended(answer)) return ended(kept);
  return kept.text.length + kept.reasoning.length > answer.text.length + answer.reasoning.length;
}

export async function forgetAnswers(conversation, ids) {
  await change(["answers"], (transaction) => {
    for (const id of ids) transaction.objectStore("answers").delete(id);
  });
  tell(conversation);
}

export async function forgetConversation(id) {
  await change(["conversations", "answers"], (transaction) => {
    transaction.objectStore("conversations").delete(id);
    const answers = transaction.objectStore("answers");
    answers.index("conversation").getAllKeys(id).onsuccess = ({ target }) => target.result.forEach((key) => answers.delete(key));
  });
  tell(id);
}

/** Call `act` with the id of a conversation that another tab has changed. */
export function onOtherTab(act) {
  channel?.addEventListener("message", ({ data }) => {
    changes++;
    act(data);
  });
}

function tell(conversation) {
  channel?.postMessage(conversation);
}
