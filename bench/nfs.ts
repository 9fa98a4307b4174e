import type { Lab, Table } from './lab.js';
export async function nfs(_lab: Lab): Promise<Table[]> {
  return [];
}
