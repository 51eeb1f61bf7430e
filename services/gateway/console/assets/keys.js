// The API key and the admin key: asked for when they are needed, kept for this tab.

class Key {
  #storage;
  #title;
  #text;
  #asking = null;

  constructor({ storage, title, text, isAlwaysNeeded }) {
    this.#storage = storage;
    this.#title = title;
    this.#text = text;
    this.isAlwaysNeeded = isAlwaysNeeded;
    this.value = read(storage);
  }

  /**
   * Ask for it; `problem` is what was wrong with the last one. Whoever asks meanwhile waits for the
   * same answer. True where one was given.
   */
  ask(problem) {
    this.#asking ??= show(this.#title, problem || this.#text).then((value) => {
      this.#asking = null;
      if (value === null) return false;
      this.value = value;
      write(this.#storage, value);
      return true;
    });
    return this.#asking;
  }
}

export const apiKey = new Key({
  storage: "expertfleet.api_key",
  title: "API key",
  text: "This gateway serves known keys only. Enter the key you call it with.",
  isAlwaysNeeded: false,
});

export const adminKey = new Key({
  storage: "expertfleet.admin_key",
  title: "Admin key",
  text: "Changing the fleet needs the key that the gateway was started with (EXPERTFLEET_ADMIN_KEY).",
  isAlwaysNeeded: true,
});

let queue = Promise.resolve();

/** One dialog at a time; the key entered, or null. */
function show(title, text) {
  const answer = queue.then(() => showNow(title, text));
  queue = answer;
  return answer;
}

function showNow(title, text) {
  const dialog = document.getElementById("key-dialog");
  const form = document.getElementById("key-form");
  const input = document.getElementById("key-input");
  document.getElementById("key-title").textContent = title;
  document.getElementById("key-text").textContent = text;
  input.value = "";
  return new Promise((resolve) => {
    let answer = null;
    form.onsubmit = (event) => {
      event.preventDefault();
      answer = input.value.trim();
      if (answer) dialog.close();
    };
    document.getElementById("key-cancel").onclick = () => dialog.close();
    dialog.onclose = () => {
      input.value = "";
      resolve(answer || null);
    };
    dialog.showModal();
    input.focus();
  });
}

function read(name) {
  try {
    return sessionStorage.getItem(name) ?? "";
  } catch {
    return "";
  }
}

function write(name, value) {
  try {
    sessionStorage.setItem(name, value);
  } catch {
    // it lasts as long as the page then
  }
}
