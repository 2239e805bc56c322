"use strict";
const groups = JSON.parse(document.getElementById("data").textContent);
const largest = Math.max(...groups.map((group) => group.members.length));
const perPage = Math.max(1, Math.floor(48 / largest));
const [search, iteration, previous, next, position, shown] =
  ["search", "iteration", "previous", "next", "position", "shown"].map((id) => document.getElementById(id));
for (const group of groups) {
  group.words = [group.prompt, ...group.members.map((member) => member.reasoning)].join("\n").toLowerCase();
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

function picture(member, group) {
  if (!member.image) return element("div", "noimage", member.drawn ? "image missing" : "no image");
  return image(member.image, `Image of member ${member.member} for: ${group.prompt}`);
}

function earlier(member) {
  const made = element("div", "earlier");
  member.earlier.forEach((source, i) => {
    if (source) made.append(image(source, `Round ${i + 1} of member ${member.member}`));
  });
  return made;
}

function facts(member) {
  const made = element("dl");
  const components = Object.entries(member.rewards);
  // Even with a single component: the combined one also holds the penalty on truncated reasoning.
  for (const [name, value] of [...components, ["reward", member.reward]]) {
    made.append(element("div", "", element("dt", "", name), element("dd", "", value)));
  }
  const sign = member.advantage?.startsWith("-") ? "minus" : "plus";
  made.append(element("div", "", element("dt", "", "advantage"), element("dd", sign, member.advantage ?? "–")));
  return made;
}

function card(member, group) {
  const made = element("li", "", picture(member, group), facts(member));
  if (member.earlier.length) made.prepend(earlier(member));
  if (!member.stopped) made.append(element("div", "tag", "cut at the limit"));
  if (!member.usable) made.append(element("div", "tag", "not learned from"));
  const reasoning = element("div", "reasoning", member.reasoning || "(no reasoning)");
  reasoning.tabIndex = 0;
  made.append(reasoning);
  return made;
}

function article(group) {
  const made = element("article", "group", element("h3", "", `Iteration ${group.iteration}`), element("p", "", group.prompt));
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
