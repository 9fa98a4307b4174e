/** Exit codes of `main.ts`, as TigerBeetle's simulator has them. */
export const EXIT_ASSERTION = 127;
export const EXIT_NO_CONVERGENCE = 128;
export const EXIT_WRONG_DATA = 129;

/** What a checker found. */
export class SimulationFailure extends Error {
  override readonly name = 'SimulationFailure';
  constructor(
    readonly exitCode: number,
    readonly checker: string,
    message: string,
  ) {
    super(`${checker}: ${message}`);
  }
}

export function wrongData(checker: string, message: string): never {
  throw new SimulationFailure(EXIT_WRONG_DATA, checker, message);
}
