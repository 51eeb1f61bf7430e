// Eight colours that people with any colour vision tell apart (after Okabe and Ito), in
// choices.css as .e0 to .e7. The number beside them is what counts: beyond eight they repeat.

export const NUM_COLOURS = 8;

/** The class that paints expert `expert`. */
export function colourOf(expert) {
  return `e${expert % NUM_COLOURS}`;
}
