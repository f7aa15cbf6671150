"use strict";
// Texts of users go in by textContent only: none of them is ever read as HTML.
const WORDS = ["bad", "poor", "fair", "good", "excellent"];
const rows = JSON.parse(document.getElementById("rows").textContent);
const card = document.getElementById("card");
let opener = null;

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function picture(row, alt) {
  if (!row.src) return make("span", "absent", row.reason);
  const image = make("img");
  image.decoding = "async";
  image.alt = alt;
  image.src = row.src;
  return image;
}

function score(value) {
  return value === null || value === undefined ? "–" : value.toFixed(2);
}

function probabilities(shares) {
  const list = make("div", "probs");
  shares.forEach((share, i) => {
    const track = make("span", "track");
    const bar = make("i", WORDS[i]);
    bar.style.width = `${100 * share}%`;
    track.append(bar);
    list.append(make("span", "", WORDS[i]), track, make("span", "share", `${(100 * share).toFixed(0)} %`));
  });
  return list;
}

function opinion(aspect) {
  const block = make("div", aspect.name);
  const interval = aspect.mos_low === null ? "" : ` [${score(aspect.mos_low)}, ${score(aspect.mos_high)}]`;
  block.append(make("h3", "", `${aspect.name}: ${score(aspect.score)}${interval} ${aspect.rating ?? ""}`));
  if (aspect.rating_probs) block.append(probabilities(aspect.rating_probs));
  if (aspect.description) block.append(make("p", "describes", aspect.description));
  if (aspect.finish_reason === "length") block.append(make("p", "small", "The description was cut at its limit."));
  return block;
}

function show(button) {
  opener = button;
  const row = rows[button.dataset.row];
  const title = document.getElementById("card-title");
  title.textContent = row.prompt ?? "no prompt";
  card.querySelector(".card-meta").textContent =
    [row.generator, row.size, row.id, row.image].filter((part, i, all) => part && all.indexOf(part) === i).join(" · ");
  card.querySelector(".card-picture").replaceChildren(picture(row, row.prompt ?? row.id));
  card.querySelector(".card-aspects").replaceChildren(...row.aspects.map(opinion));
  if (!card.open) card.showModal();
  card.scrollTop = 0;
  title.focus();
}

function step(by) {
  const strip = [...opener.closest(".strip").querySelectorAll("button")];
  show(strip[(strip.indexOf(opener) + by + strip.length) % strip.length]);
}

for (const button of document.querySelectorAll(".strip button")) {
  // The caption's text beside it says what the picture is of.
  button.querySelector(".picture").append(picture(rows[button.dataset.row], ""));
  button.addEventListener("click", () => show(button));
}
card.addEventListener("click", (event) => {
  if (event.target === card || event.target.closest("[data-close]")) card.close();
  const by = event.target.closest("[data-step]");
  if (by) step(Number(by.dataset.step));
});
card.addEventListener("keydown", (event) => {
  if (event.key === "ArrowRight") step(1);
  if (event.key === "ArrowLeft") step(-1);
});
card.addEventListener("close", () => opener.focus());
