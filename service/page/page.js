// Sends dropped images to /predict, one request each, and shows the answers in their order.
// Where the service asks for an API key, so does the page; it lives in this tab's session storage and nowhere else.
"use strict";

const KEY = "foldserve-api-key";

const find = (id) => document.getElementById(id);
const percent = (score) => `${(100 * score).toFixed(score > 0.9995 || score < 0.1 ? 2 : 1)} %`;

async function ask(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const response = await fetch(path, { ...options, headers: key ? { "X-API-Key": key } : {} });
  if (response.status === 401 || response.status === 403) {
    find("refusal").textContent = (await response.clone().json()).detail;
    showAccess(true);
  }
  return response;
}

function showAccess(isAsked) {
  find("access").hidden = !isAsked;
  find("forget").hidden = isAsked || !sessionStorage.getItem(KEY);
}

async function showModel() {
  const response = await ask("models");
  if (!response.ok) {
    find("model").textContent = (await response.json()).title;
    return [];
  }
  const { models, default: standard } = await response.json();
  showAccess(false);
  offer(models, standard);
  find("model").textContent = models.length
    ? models.map((one) => `${one.name}, version ${one.version}: ${one.labels.slice(0, 12).join(", ")}${one.labels.length > 12 ? ", …" : ""}`).join(" · ")
    : "no model is ready yet";
  return models;
}

// Keeps what was chosen as long as it is served; else the model that answers who names none.
function offer(models, standard) {
  const names = models.map((one) => one.name);
  const kept = names.includes(find("chosen").value) ? find("chosen").value : standard || names[0];
  find("chosen").replaceChildren(...names.map((name) => new Option(name, name, false, name === kept)));
  find("choice").hidden = names.length < 2;
}

function newAnswer(file) {
  const item = find("answer").content.cloneNode(true).firstElementChild;
  const image = item.querySelector("img");
  image.src = URL.createObjectURL(file);
  image.onload = () => URL.revokeObjectURL(image.src);
  image.onerror = () => { image.onload(); image.hidden = true; }; // a browser's sign of a broken picture says nothing
  item.querySelector(".name").textContent = file.name;
  item.querySelector(".label").textContent = "…";
  find("answers").append(item);
  return item;
}

function fill(item, ok, answer) {
  const label = item.querySelector(".label");
  if (!ok) {
    item.classList.add("bad");
    label.textContent = `${answer.title}: ${answer.detail}`;
    return;
  }
  const prediction = answer.predictions[0];
  label.textContent = prediction.label;
  for (const { label: name, score } of prediction.top) {
    const row = item.querySelector("tbody").insertRow();
    row.insertCell().textContent = name;
    const meter = document.createElement("meter");
    meter.value = score;
    row.insertCell().append(meter);
    row.insertCell().textContent = percent(score);
  }
}

async function predict(item, file, model) {
  if (!file.size) {
    fill(item, false, { title: "No image", detail: "the file is empty" });
    return;
  }
  const body = file.slice(0, file.size, "application/octet-stream"); // what it is the service sees, whatever its name ends in
  try {
    const response = await ask(`predict?model=${encodeURIComponent(model)}`, { method: "POST", body });
    fill(item, response.ok, await response.json());
  } catch (error) {
    fill(item, false, { title: "No answer", detail: "the server cannot be reached" });
  }
}

async function take(files) {
  const models = await showModel();
  if (!models.length) return;
  find("answers").replaceChildren();
  const items = [...files].map((file) => [newAnswer(file), file]);
  for (const [index, [item, file]] of items.entries()) {
    find("status").textContent = `${index + 1} of ${items.length}`;
    await predict(item, file, find("chosen").value);
  }
  find("status").textContent = items.length === 1 ? "1 image" : `${items.length} images`;
}

find("files").addEventListener("change", (event) => {
  const files = [...event.target.files];
  event.target.value = ""; // else the same file, chosen again for another model, would be no change
  take(files);
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    find("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") take(event.dataTransfer.files);
  });
}
find("access").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, find("key").value);
  find("key").value = "";
  showModel();
});
find("forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  find("answers").replaceChildren();
  find("status").textContent = "";
  showModel();
});
showModel();
