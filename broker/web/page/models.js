// The list of models: loaded from the broker, searched, and chosen from in one dialog.

import { $, make, put } from "./dom.js";
import { isFree, price, prices, short } from "./format.js";
import { FIGURES, MODELS } from "./sentences.js";
import { authorization, set, settings } from "./settings.js";

const PAUSES = [2_000, 10_000, 30_000];
const TIMEOUT = 10_000;
const MOST = 300; // rows shown; a search finds the others

let models = [];
let shown = [];
let active = 0;
let chosen = null; // what to do with the model that is chosen, where it is not for the next message
let changed = () => {};

export const modelOf = (id) => models.find((model) => model.id === id);
export const isRehearsal = () => models.length > 0 && models.every(({ id }) => id.startsWith("rehearsal/"));

/** Return the model for the next message; empty where the broker's default is to be used. */
export function currentModel() {
  return (modelOf(settings.model) ?? models[0])?.id ?? "";
}

export const nameOf = (id) => (modelOf(id)?.name ?? id) || MODELS.none;

/** Load the list, again until it is there; all attempts but the first run in the background. `asksKey` is called after a 401. */
export async function loadModels(asksKey, [pause, ...later] = PAUSES) {
  try {
    const response = await fetch("models", { headers: authorization(), signal: AbortSignal.timeout(TIMEOUT) });
    if (response.status === 401) return void asksKey();
    if (response.ok) {
      models = (await response.json()).data ?? [];
      return offer();
    }
  } catch {
    // Handled like an answer without a list: it is tried again.
  }
  offer();
  if (pause) setTimeout(() => loadModels(asksKey, later), pause);
}

function offer() {
  const id = currentModel();
  $("model").textContent = nameOf(id);
  $("model").ariaLabel = MODELS.choose(nameOf(id));
  $("model").title = models.length ? [id, price(modelOf(id))].join(" · ") : MODELS.away;
  changed();
}

/** Open the list. `then` gets the id of the chosen model; without it, the model is used for what follows. */
export function openModels(then = null) {
  chosen = then;
  $("modelSearch").value = "";
  $("freeOnly").checked = settings.free;
  $("sortBy").value = settings.sort;
  $("models").showModal();
  list(); // after it is shown, so that the chosen model can be scrolled to
  $("modelSearch").focus();
}

function list() {
  const words = $("modelSearch").value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = models.filter((model) => {
    const text = `${model.id} ${model.name ?? ""} ${price(model)}`.toLowerCase();
    return words.every((word) => text.includes(word)) && (!settings.free || isFree(model));
  });
  const cost = (model) => prices(model)?.output ?? Infinity;
  if (settings.sort === "price") found.sort((one, other) => cost(one) - cost(other));
  if (settings.sort === "context") found.sort((one, other) => (other.context_length ?? 0) - (one.context_length ?? 0));
  shown = found.slice(0, MOST);
  active = Math.max(0, words.length ? 0 : shown.findIndex(({ id }) => id === currentModel()));
  $("modelList").replaceChildren(...shown.map(row));
  put($("modelCount"), found.length ? MODELS.count(found.length) : models.length ? MODELS.noMatch : MODELS.away);
  $("modelList").hidden = !found.length;
  activate(active);
}

function row(model, n) {
  const facts = [price(model), model.context_length && FIGURES.context(short(model.context_length))].filter(Boolean).join(" · ");
  const option = make("div", { id: `model-${n}`, role: "option", className: "option" },
    make("span", { className: "name" }, model.name ?? model.id),
    make("span", { className: "facts" }, facts),
    make("span", { className: "id" }, isRehearsal() ? model.description?.replaceAll("`", "") ?? model.id : model.id));
  option.ariaSelected = String(model.id === currentModel());
  option.dataset.id = model.id;
  return option;
}

function activate(n) {
  const rows = $("modelList").children;
  rows[active]?.classList.remove("active");
  active = Math.min(Math.max(n, 0), rows.length - 1);
  rows[active]?.classList.add("active");
  rows[active]?.scrollIntoView({ block: "nearest" });
  if (rows[active]) $("modelSearch").setAttribute("aria-activedescendant", rows[active].id);
  else $("modelSearch").removeAttribute("aria-activedescendant");
}

function choose(id) {
  $("models").close();
  if (chosen) return chosen(id);
  set({ model: id });
  offer();
  $("text").focus({ preventScroll: true });
}

/** Connect the dialog. `onChange` is called when the list or the choice is another one. */
export function startModels(onChange) {
  changed = onChange;
  $("model").textContent = MODELS.loading;
  $("model").addEventListener("click", () => openModels());
  $("modelSearch").addEventListener("input", list);
  $("freeOnly").addEventListener("change", () => {
    set({ free: $("freeOnly").checked });
    list();
  });
  $("sortBy").addEventListener("change", () => {
    set({ sort: $("sortBy").value });
    list();
  });
  $("modelList").addEventListener("click", ({ target }) => {
    const id = target.closest(".option")?.dataset.id;
    if (id) choose(id);
  });
  $("modelSearch").addEventListener("keydown", (event) => {
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8 }[event.key];
    if (steps) activate(active + steps);
    else if (event.key === "Enter") shown[active] && choose(shown[active].id);
    else return;
    event.preventDefault();
  });
}
