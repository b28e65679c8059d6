// The contents: open beside the page where there is room; a choice in them closes them where there is not.
const contents = document.querySelector(".contents details");
const beside = matchMedia("(min-width: 76rem)");
function unfold() {
  if (contents) contents.open = beside.matches;
}
unfold();
beside.addEventListener("change", unfold);
if (contents) contents.addEventListener("click", event => {
  if (event.target.closest("a") && !beside.matches) contents.open = false;
});
// On a phone a section is its verdict and its figure; the tables are a tap away. On paper everything is unfolded.
if (matchMedia("(max-width: 34rem)").matches) {
  for (const table of document.querySelectorAll("details.numbers")) table.open = false;
}
addEventListener("beforeprint", () => {
  for (const folded of document.querySelectorAll("main details")) folded.open = true;
});
// The filter by verdict and source: rows, sections and contents of the other claims are hidden.
const filter = document.querySelector(".filter");
function choose() {
  const shown = new Set();
  const rows = document.querySelectorAll("tr[data-claim]");
  for (const row of rows) {
    const { verdict, source } = filter.elements;
    const fits = (!verdict.value || row.dataset.verdict === verdict.value)
      && (!source.value || row.dataset.sources.split("|").includes(source.value));
    if (fits) shown.add(row.dataset.claim);
  }
  for (const part of document.querySelectorAll("[data-claim]")) part.hidden = !shown.has(part.dataset.claim);
  const said = filter.querySelector("output");
  said.textContent = said.dataset.words.replace("{shown}", shown.size).replace("{all}", rows.length);
}
if (filter) {
  filter.hidden = false;
  filter.addEventListener("change", choose);
  choose();
}
// Mark in the contents where the reader is.
const places = new Map([...document.querySelectorAll(".contents li a")].map(link => [link.hash.slice(1), link]));
const watcher = new IntersectionObserver(seen => {
  for (const { isIntersecting, target } of seen) {
    const link = places.get(target.id);
    if (link && isIntersecting) {
      for (const other of places.values()) other.removeAttribute("aria-current");
      link.setAttribute("aria-current", "location");
    }
  }
}, { rootMargin: "-20% 0px -70% 0px" });
for (const section of document.querySelectorAll("main")) watcher.observe(section);
