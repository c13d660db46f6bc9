/** The card of an adapter in a dialog. */

import { readCard } from "./api.js";
import { fillFacts, find } from "./dom.js";

const dialog = find("#card");

/** Open the dialog with the card of NAME, or of NAME@VERSION. */
export async function showCard(name, version) {
  const card = await readCard(name, version);
  find("#card-title").textContent = card.name;
  fillFacts(find("#card-facts"), factsOfCard(card));
  find("#card-json").textContent = JSON.stringify(card, null, 2);
  find("details", dialog).open = false;
  dialog.showModal();
}

function factsOfCard({ version, kind, base, tuner, objective, dataset, training, lineage, files, created }) {
  const bytes = Object.values(files ?? {}).reduce((sum, file) => sum + file.bytes, 0);
  const facts = [
    ["Version", version],
    ["Made", created && new Date(created).toLocaleString()],
    ["Kind", [kind, tuner?.rank && `rank ${tuner.rank}`, tuner?.targets].filter(Boolean).join(", ")],
    ["Learned", objective?.type],
    ["Base", base?.source],
    ["From", dataset && `${dataset.images} images`],
    ["Trained", training && `${training.steps} steps, ${numberText(training.device_hours)} h on ${training.device}`],
    ["Validation loss", training?.val_loss != null && numberText(training.val_loss)],
    ...Object.entries(training?.scores ?? {}).map(([name, value]) => [name.toUpperCase(), numberText(value)]),
    ["Run", lineage?.trial ?? lineage?.run ?? lineage?.study ?? lineage?.file],
    ["Continues", lineage?.init],
    ["Fused", lineage?.fusion?.adapters.map((name, i) => `${name}:${lineage.fusion.weights[i]}`).join(", ")],
    ["Size", bytes > 0 && `${(bytes / 1e6).toFixed(1)} MB`],
  ];
  return facts.filter(([, value]) => value).map(([term, value]) => [term, String(value)]);
}

const numberText = (value) => Number(value).toLocaleString(undefined, { maximumSignificantDigits: 3 });
