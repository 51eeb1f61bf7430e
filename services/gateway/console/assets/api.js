// Requests to the gateway that served this page. A 401 asks for the key and tries once more.

import { adminKey, apiKey } from "./keys.js";

/** What the gateway refused. `status` is HTTP's, 0 where no answer came. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The JSON that `path` answers, as {json, headers}. Throws ApiError; AbortError when cancelled. */
export async function call(path, { body, signal, admin = false } = {}) {
  const response = await send(path, { body, signal, key: admin ? adminKey : apiKey });
  const json = await response.json().catch(() => {
    throw new ApiError(response.status, "The answer is not JSON: is this an expertfleet gateway?");
  });
  return { json, headers: response.headers };
}

/** The body of an event stream. `onWait` is called before a person is asked for the key. */
export async function openStream(path, signal, onWait) {
  return (await send(path, { signal, key: apiKey, accept: "text/event-stream", onWait })).body;
}

async function send(path, { body, signal, key, accept = "application/json", onWait }) {
  const init = () => ({
    method: body === undefined ? "GET" : "POST",
    headers: {
      accept,
      ...(body === undefined ? {} : { "content-type": "application/json" }),
      ...(key.value ? { authorization: `Bearer ${key.value}` } : {}),
    },
    body: body === undefined ? undefined : JSON.stringify(body),
    cache: "no-store",
    signal,
  });
  if (!key.value && key.isAlwaysNeeded && !(await key.ask(""))) {
    throw new ApiError(401, "No key was given.");
  }
  for (;;) {
    const used = key.value;
    const response = await reach(path, init());
    if (response.ok) return response;
    const message = await errorMessage(response);
    if (response.status !== 401) throw new ApiError(response.status, message);
    onWait?.();
    // Another request may have been given the right key meanwhile.
    if (key.value === used && !(await key.ask(used ? message : ""))) {
      throw new ApiError(401, message);
    }
  }
}

async function reach(path, init) {
  try {
    return await fetch(path, init);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The gateway cannot be reached.");
  }
}

/** The gateway's own words, or at least the status. */
async function errorMessage(response) {
  try {
    const { error } = await response.json();
    if (typeof error?.message === "string") return error.message;
  } catch {
    // a proxy's page
  }
  return `The gateway answered ${response.status} ${response.statusText}`.trim();
}
