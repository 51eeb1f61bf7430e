// The live view of the fleet: one stream, opened again whenever it ends.

import { ApiError, openStream } from "./api.js";
import { EventParser } from "./event_stream.js";

const FIRST_RETRY_S = 0.5;
const LONGEST_RETRY_S = 10;
// The gateway sends a comment every 10 s when nothing changes: a stream this quiet is broken.
const SILENCE_S = 25;

/**
 * Calls `onView(view)` for every view and `onState({kind, retryInS, message})` for every change of
 * kind: "connecting", "live", "lost" (it tries again in `retryInS`) or "denied" (a key is needed and
 * was not given; `retry()` asks again).
 */
export class Feed {
  #onView;
  #onState;
  #retryS = FIRST_RETRY_S;
  #wake = () => {};

  constructor({ onView, onState }) {
    this.#onView = onView;
    this.#onState = onState;
  }

  /** Runs for as long as the page lives. */
  async run() {
    this.#onState({ kind: "connecting" });
    for (;;) {
      const problem = await this.#follow();
      const { status, message } = problem;
      // Pages that lost the same gateway do not all come back at the same moment.
      const waitS = status === 401 ? null : this.#retryS * (0.8 + 0.4 * Math.random());
      this.#onState({ kind: status === 401 ? "denied" : "lost", retryInS: waitS, message });
      await this.#pause(waitS);
      this.#retryS = Math.min(this.#retryS * 2, LONGEST_RETRY_S);
    }
  }

  /** Do not wait any longer. */
  retry() {
    this.#retryS = FIRST_RETRY_S;
    this.#wake();
  }

  async #follow() {
    const abort = new AbortController();
    let watchdog = 0;
    const listen = () => {
      clearTimeout(watchdog);
      watchdog = setTimeout(() => abort.abort(), SILENCE_S * 1000);
    };
    try {
      listen();
      const body = await openStream("v1/experts/events", abort.signal, () => clearTimeout(watchdog));
      const parser = new EventParser();
      const decoder = new TextDecoder();
      const reader = body.getReader();
      for (;;) {
        listen();
        const { done, value } = await reader.read();
        if (done) return new ApiError(0, "The gateway closed the connection.");
        for (const { event, data } of parser.push(decoder.decode(value, { stream: true }))) {
          if (event === "fleet") this.#tell(data);
        }
      }
    } catch (error) {
      if (error instanceof ApiError) return error;
      const isSilent = abort.signal.aborted;
      return new ApiError(0, isSilent ? `No word for ${SILENCE_S} s.` : "The gateway cannot be reached.");
    } finally {
      clearTimeout(watchdog);
      abort.abort();
    }
  }

  /** A mistake in drawing a view is told to the console, and does not pass for a lost connection. */
  #tell(data) {
    this.#retryS = FIRST_RETRY_S;
    this.#onState({ kind: "live" });
    try {
      this.#onView(JSON.parse(data));
    } catch (error) {
      reportError(error);
    }
  }

  #pause(waitS) {
    return new Promise((resolve) => {
      const timer = waitS === null ? 0 : setTimeout(resolve, waitS * 1000);
      this.#wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }
}
