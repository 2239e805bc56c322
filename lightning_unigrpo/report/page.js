"use strict";
const groups = JSON.parse(document.getElementById("data").textContent);
const largest = Math.max(...groups.map((group) => group.members.length));
const perPage = Math.max(1, Math.floor(48 / largest));
const [search, iteration, previous, next, position, shown] =
  ["search", "iteration", "previous", "next", "position", "shown"].map((id) => document.getElementById(id));
for (const group of groups) {
  const said = group.members.flatMap((member) =>
    [member.reasoning, ...member.rounds.flatMap((round) => [round.turn ?? "", round.reasoning])]);
  group.words = [group.prompt, ...said].join("\n").toLowerCase();
}
for (const each of new Set(groups.map((group) => group.iteration))) iteration.add(new Option(each, each));
let found = groups;
let page = 0;

// Whatever a model or a user wrote enters the page as text, never as markup.
function element(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

function image(source, alt) {
  const made = element("img");
  made.src = source;
  made.alt = alt;
  return made;
}

function picture(drawn, alt) {
  if (!drawn.image) return element("div", "noimage", drawn.drawn ? "image missing" : "no image");
  return image(drawn.image, alt);
}

function fact(name, value, className) {
  return element("div", "", element("dt", "", name), element("dd", className, value));
}

function advantage(value) {
  return fact("advantage", value ?? "–", value?.startsWith("-") ? "minus" : "plus");
}

function facts(member) {
  const made = element("dl");
  const components = Object.entries(member.rewards);
  // Even with a single component: the combined one also holds the penalty on truncated reasoning.
  for (const [name, value] of [...components, ["reward", member.reward]]) made.append(fact(name, value));
  // Rounds that learn from advantages of their own show them.
  if (!member.rounds.some((round) => round.advantage)) made.append(advantage(member.advantage));
  return made;
}

function words(className, ...children) {
  const made = element("div", className, ...children);
  made.tabIndex = 0;  // long ones scroll
  return made;
}

function round(each, number, member, group) {
  const made = element("section", "round", element("h4", "", `Round ${number}`));
  if (each.turn !== null) made.append(words("turn", element("span", "soft", "user "), each.turn));
  if (each.reasoning) made.append(words("reasoning", each.reasoning));
  if (each.drawn) made.append(picture(each, `Round ${number} of member ${member.member} for: ${group.prompt}`));
  const known = element("dl");
  if (each.reward !== null) known.append(fact("reward", each.reward));
  if (each.advantage !== null) known.append(advantage(each.advantage));
  if (known.children.length) made.append(known);
  return made;
}

function card(member, group) {
  const made = element("li");
  if (member.rounds.length) made.append(...member.rounds.map((each, i) => round(each, i + 1, member, group)));
  else made.append(picture(member, `Image of member ${member.member} for: ${group.prompt}`));
  made.append(facts(member));
  if (member.ended) made.append(element("div", "soft", member.ended));
  if (!member.stopped) made.append(element("div", "tag", "cut at the limit"));
  if (!member.usable) made.append(element("div", "tag", "not learned from"));
  if (!member.rounds.length) made.append(words("reasoning", member.reasoning || "(no reasoning)"));
  return made;
}

function inputs(group) {
  const made = element("div", "inputs");
  group.inputs.forEach((source, i) => {
    made.append(picture({ image: source, drawn: true }, `Input image ${i + 1} for: ${group.prompt}`));
  });
  return made;
}

function article(group) {
  const made = element("article", "group", element("h3", "", `Iteration ${group.iteration}`), element("p", "", group.prompt));
  if (group.inputs.length) made.append(inputs(group));
  if (group.members.length < group.size) {
    made.append(element("p", "soft", `${group.members.length} of ${group.size} members: the others were drawn on other ranks.`));
  }
  made.append(element("ul", "members", ...group.members.map((member) => card(member, group))));
  return made;
}

function render() {
  const pages = Math.max(1, Math.ceil(found.length / perPage));
  page = Math.min(Math.max(page, 0), pages - 1);
  shown.replaceChildren(...found.slice(page * perPage, (page + 1) * perPage).map(article));
  const many = found.length === 1 ? "1 group" : `${found.length} groups`;
  position.textContent = found.length ? `${many}, page ${page + 1} of ${pages}` : "no group matches";
  previous.disabled = page === 0;
  next.disabled = page === pages - 1;
}

function turn(pages) {
  page += pages;
  render();
  const section = document.getElementById("groups");
  if (section.getBoundingClientRect().top < 0) section.scrollIntoView();
}

function filter() {
  const words = search.value.toLowerCase();
  found = groups.filter((group) =>
    group.words.includes(words) && (iteration.value === "" || group.iteration === Number(iteration.value)));
  page = 0;
  render();
}

search.addEventListener("input", filter);
iteration.addEventListener("change", filter);
previous.addEventListener("click", () => turn(-1));
next.addEventListener("click", () => turn(1));
document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
render();
