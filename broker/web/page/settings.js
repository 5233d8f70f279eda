// What the reader has chosen: kept in localStorage for all tabs. The access key stays in the tab (sessionStorage): it is
// a secret.

import { $ } from "./dom.js";

const NAME = `session-broker${location.pathname}`;
const FIELDS = ["temperature", "maxTokens", "effort", "system"];

export const settings = { model: "", free: false, sort: "", ...kept(() => JSON.parse(localStorage.getItem(NAME))) };

function kept(act) {
  try {
    return act();
  } catch {
    return null; // no storage: the choice holds until the page is closed
  }
}

/** Change some of the settings, and keep them. */
export function set(changes) {
  Object.assign(settings, changes);
  kept(() => localStorage.setItem(NAME, JSON.stringify(settings)));
}

let key = kept(() => sessionStorage.getItem(NAME)) ?? "";

export const accessKey = () => key;

export function setAccessKey(text) {
  key = text;
  kept(() => sessionStorage.setItem(NAME, text));
}

export const authorization = () => (key ? { Authorization: `Bearer ${key}` } : {});

/** Return the parameters of a request that the reader has set. */
export function parameters() {
  const { temperature, maxTokens, effort } = settings;
  return {
    ...(temperature && { temperature: Number(temperature) }),
    ...(maxTokens && { max_tokens: Number(maxTokens) }),
    ...(effort && { reasoning: { effort } }),
  };
}

/** Connect the drawer to the settings. */
export function startSettings() {
  const drawer = $("settings");
  const show = () => {
    for (const name of FIELDS) $(name).value = settings[name] ?? "";
    mark();
  };
  const mark = () => $("openSettings").classList.toggle("set", FIELDS.some((name) => settings[name]));
  for (const name of FIELDS) {
    $(name).addEventListener("input", () => {
      if (!$(name).checkValidity()) return;
      set({ [name]: $(name).value.trim() });
      mark();
    });
  }
  $("resetSettings").addEventListener("click", () => {
    set(Object.fromEntries(FIELDS.map((name) => [name, ""])));
    show();
  });
  $("openSettings").addEventListener("click", () => {
    show();
    drawer.showModal();
  });
  show();
}
