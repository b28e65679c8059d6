// Show the value of the point of a figure that is nearest to the mouse or the finger.
const bubble = document.body.appendChild(document.createElement("div"));
bubble.className = "readout";
bubble.hidden = true;
let marked = null;
function hide() {
  bubble.hidden = true;
  if (marked) marked.classList.remove("near");
  marked = null;
}
function show(event) {
  const picture = event.target.closest(".panels svg");
  if (!picture) return hide();
  let best = null, least = 40 * 40;
  for (const value of picture.querySelectorAll("circle.value")) {
    const box = value.getBoundingClientRect();
    const across = box.x + box.width / 2 - event.clientX, up = box.y + box.height / 2 - event.clientY;
    if (across * across + up * up < least) [best, least] = [value, across * across + up * up];
  }
  if (!best) return hide();
  if (marked !== best) {
    hide();
    marked = best;
    best.classList.add("near");
    bubble.textContent = best.querySelector("title").textContent;
  }
  bubble.hidden = false;
  const room = document.documentElement.clientWidth - bubble.offsetWidth - 8;
  bubble.style.left = Math.max(8, Math.min(event.clientX + 14, room)) + "px";
  bubble.style.top = Math.max(8, event.clientY - bubble.offsetHeight - 14) + "px";
}
document.addEventListener("pointermove", show);
document.addEventListener("pointerdown", show);
document.addEventListener("scroll", hide, { passive: true });
