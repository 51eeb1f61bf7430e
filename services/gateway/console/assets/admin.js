// What only an administrator may do: drain a worker, add or take away a replica.

import { ApiError, call } from "./api.js";
import { el, setText } from "./dom.js";

export class Admin {
  #isOn = false;

  /** Shown only where the gateway has an admin key. */
  setOn(isOn) {
    this.#isOn = isOn;
  }

  drainButton(workerId) {
    const button = el("button", {
      type: "button", class: "small drain", hidden: true, "aria-label": `Drain worker ${workerId}`,
      on: { click: () => this.#drain(workerId, button) },
    }, "Drain");
    return el("span", { class: "acts" }, button, el("span", { class: "note", role: "status" }));
  }

  showDrain(acts, worker) {
    acts.firstChild.hidden = !(this.#isOn && worker.state === "ready");
  }

  /** The controls below one expert's figures. */
  create() {
    return el("div", { class: "cell-admin", hidden: true },
      el("span", {}, "Replicas"),
      el("button", { type: "button", class: "small", data: { act: "less" } }, "Remove one"),
      el("button", { type: "button", class: "small", data: { act: "more" } }, "Add one"),
      el("p", { class: "note", role: "status" }));
  }

  update(root, view, slot, holders) {
    root.hidden = !(this.#isOn && view.workers.length);
    const ready = holders.filter((worker) => worker.state === "ready").length;
    const [, less, more, note] = root.children;
    less.disabled = ready < 2;
    less.title = ready < 2 ? "The last replica stays" : "";
    less.onclick = () => this.#scale(slot, ready - 1, root, note);
    more.onclick = () => this.#scale(slot, ready + 1, root, note);
  }

  async #drain(workerId, button) {
    const isSure = await confirm(`Drain ${workerId}?`,
      "It takes no more work, finishes what it has and leaves. Experts that only it holds are not served until another worker holds them.",
      "Drain");
    if (!isSure) return;
    await this.#act(`admin/workers/${encodeURIComponent(workerId)}/drain`, {}, [button], button.nextElementSibling,
      ({ unserved }) => (unserved?.length ? `Draining. ${unserved.length === 1 ? "1 slot waits" : `${unserved.length} slots wait`} for another worker.` : "Draining."));
  }

  #scale({ layer, expert }, replicas, root, note) {
    return this.#act(`admin/experts/${layer}/${expert}/replicas`, { replicas }, [...root.querySelectorAll("button")], note,
      (answer) => `Done: ${answer.replicas} held.`);
  }

  async #act(path, body, buttons, note, done) {
    setText(note, "Working …");
    for (const button of buttons) button.setAttribute("aria-busy", "true");
    try {
      const { json } = await call(path, { body, admin: true });
      setText(note, done(json));
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      setText(note, error.message);
    } finally {
      for (const button of buttons) button.removeAttribute("aria-busy");
    }
  }
}

/** Ask before what cannot be undone. */
function confirm(title, text, act) {
  const dialog = document.getElementById("confirm-dialog");
  setText(document.getElementById("confirm-title"), title);
  setText(document.getElementById("confirm-text"), text);
  setText(document.getElementById("confirm-ok"), act);
  return new Promise((resolve) => {
    let isSure = false;
    document.getElementById("confirm-form").onsubmit = (event) => {
      event.preventDefault();
      isSure = true;
      dialog.close();
    };
    document.getElementById("confirm-cancel").onclick = () => dialog.close();
    dialog.onclose = () => resolve(isSure);
    dialog.showModal();
    document.getElementById("confirm-cancel").focus();
  });
}
