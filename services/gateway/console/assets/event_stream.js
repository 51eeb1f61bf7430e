// Server-sent events out of a fetch body (the HTML standard, section 9.2.6).
// EventSource cannot send an Authorization header, so the page reads the stream itself.

/** Collects text and gives whole events: {event, data}. Comments and unknown fields are ignored. */
export class EventParser {
  #rest = "";
  #event = "";
  #data = [];

  /** The events that `text`, the next piece of the stream, completes. */
  push(text) {
    const lines = (this.#rest + text).split(/\r\n|\n|\r(?!$)/);
    this.#rest = lines.pop();
    const events = [];
    for (const line of lines) {
      if (line === "") {
        if (this.#data.length) events.push({ event: this.#event || "message", data: this.#data.join("\n") });
        this.#event = "";
        this.#data = [];
        continue;
      }
      const colon = line.indexOf(":");
      if (colon === 0) continue;
      const field = colon < 0 ? line : line.slice(0, colon);
      const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
      if (field === "event") this.#event = value;
      else if (field === "data") this.#data.push(value);
    }
    return events;
  }
}
