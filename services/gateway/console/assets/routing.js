// The text box: run a prompt, then look at where each layer sent its tokens.

import { ApiError, call } from "./api.js";
import { Choices } from "./choices.js";
import { el, setText } from "./dom.js";
import { plural, seconds } from "./format.js";
import { Repeats } from "./repeats.js";

const SAMPLE = "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n\n\ndef test_";

export class Routing {
  #form = document.getElementById("prompt-form");
  #run = document.getElementById("run");
  #cancel = document.getElementById("cancel");
  #status = document.getElementById("run-status");
  #result = document.getElementById("routing-result");
  #layer = document.getElementById("layer");
  #choices;
  #repeats;
  #abort = null;
  #model = null;

  constructor() {
    document.getElementById("prompt").value = SAMPLE;
    this.#choices = new Choices();
    this.#repeats = new Repeats({ onLayer: (layer) => this.#setLayer(layer) });
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#start();
    });
    this.#form.elements.prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.#form.requestSubmit();
    });
    this.#cancel.addEventListener("click", () => this.#abort?.abort());
    this.#layer.addEventListener("input", () => this.#setLayer(Number(this.#layer.value)));
  }

  /** The model that is served; until it is known nothing can run. */
  setModel(name) {
    this.#model = name;
  }

  async #start() {
    if (this.#abort) return;
    const abort = (this.#abort = new AbortController());
    this.#busy(true);
    setText(this.#status, "Running …");
    const started = performance.now();
    try {
      const { json } = await call("v1/completions", {
        signal: abort.signal,
        body: {
          ...(this.#model ? { model: this.#model } : {}),
          prompt: this.#form.elements.prompt.value,
          max_tokens: Number(this.#form.elements.max_tokens.value),
          temperature: 0,
          return_expert_choices: true,
        },
      });
      const choices = json.choices[0].expert_choices;
      if (!choices) throw new ApiError(0, "The gateway answered without expert choices.");
      this.#show(choices);
      this.#tell(json, (performance.now() - started) / 1000);
    } catch (error) {
      if (error.name === "AbortError") setText(this.#status, "Cancelled.");
      else if (error instanceof ApiError) this.#fail(error);
      else throw error;
    } finally {
      this.#abort = null;
      this.#busy(false);
    }
  }

  #tell(answer, elapsedS) {
    const { prompt_tokens: before, completion_tokens: after } = answer.usage ?? {};
    this.#status.replaceChildren(
      `${plural(before ?? 0, "token")} in, ${after ?? 0} out in ${seconds(elapsedS)}. `,
      el("a", { href: `#trace=${encodeURIComponent(answer.id)}` }, "Its trace"),
    );
  }

  #fail(error) {
    const what = error.status === 429 || error.status === 503 ? " Try again in a moment." : "";
    this.#status.replaceChildren(el("span", { class: "bad" }, "✕ "), `${error.message}${what}`);
  }

  #busy(isBusy) {
    this.#run.disabled = isBusy;
    this.#cancel.hidden = !isBusy;
  }

  #show(choices) {
    this.#result.hidden = false;
    this.#layer.max = String(choices.num_layers - 1);
    this.#choices.show(choices);
    this.#repeats.show(choices);
    this.#setLayer(Math.min(Number(this.#layer.value), choices.num_layers - 1));
  }

  #setLayer(layer) {
    this.#layer.value = String(layer);
    setText(document.getElementById("layer-value"), String(layer));
    this.#layer.setAttribute("aria-valuetext", `Layer ${layer}`);
    this.#choices.setLayer(layer);
    this.#repeats.setLayer(layer);
  }
}
