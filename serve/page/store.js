/** Pictures that outlive the page, in the browser's own database. The oldest go when there are too many. */

const MAX_PICTURES = 120;
const MAX_BYTES = 200 * 2 ** 20;

const opened = new Promise((resolve, reject) => {
  const opening = indexedDB.open("gtl-studio", 1);
  opening.onupgradeneeded = () => opening.result.createObjectStore("pictures", { keyPath: "id" });
  opening.onsuccess = () => resolve(opening.result);
  opening.onerror = () => reject(opening.error);
});
opened.catch(() => {}); // every call says so by itself

async function pictures(mode, ask) {
  const database = await opened;
  return new Promise((resolve, reject) => {
    const transaction = database.transaction("pictures", mode);
    const asked = ask(transaction.objectStore("pictures"));
    transaction.oncomplete = () => resolve(asked.result);
    transaction.onabort = () => reject(transaction.error);
  });
}

/** All of them, newest first. */
export const readPictures = async () => (await pictures("readonly", (store) => store.getAll())).reverse();
export const writePicture = (record) => pictures("readwrite", (store) => store.put(record));
export const erasePicture = (id) => pictures("readwrite", (store) => store.delete(id));
export const erasePictures = () => pictures("readwrite", (store) => store.clear());

/** Which of these, newest first, are beyond the bounds. */
export function beyondBounds(records) {
  let bytes = 0;
  return records.filter(({ picture, thumbnail, source, mask }, position) => {
    bytes += picture.size + thumbnail.size + (source?.size ?? 0) + (mask?.size ?? 0);
    return position >= MAX_PICTURES || bytes > MAX_BYTES;
  });
}
