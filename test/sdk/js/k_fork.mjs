// Program k: sandboxes made from a snapshot, and forks, have the files and the running process, and go ways of their own.
import { Sandbox } from '@e2b/code-interpreter'
import { assert, patience, saw } from './check.mjs'
import { counted, identity, startCounter } from './machine.mjs'

const timeoutMs = 300_000 * patience
const sandbox = await Sandbox.create({ timeoutMs })

/** Checks that copies have what was there, and that neither each other nor the original sees what one of them does. */
async function goTheirOwnWays(what, copies, name, n) {
  const all = [sandbox, ...copies]
  for (const copy of copies) {
    assert.equal(await copy.files.read('shared.txt'), 'from before')
    await counted(copy, name, n)
  }
  for (const [i, s] of all.entries()) await s.files.write('own.txt', `${what} ${i}`)
  for (const [i, s] of all.entries()) assert.equal(await s.files.read('own.txt'), `${what} ${i}`)
  const ids = await Promise.all(all.map(identity))
  for (let i = 0; i < ids[0].length; i++) {
    assert.equal(new Set(ids.map((id) => id[i])).size, all.length, `they share ${ids[0][i]}: ${JSON.stringify(ids)}`)
  }
  await copies[0].commands.run("pkill -f '[c]ounter.py'")
  for (const s of all.filter((s) => s !== copies[0])) await counted(s, name, await counted(s, name, 0))
  saw(what, `${copies.length} copies have the files and the process, and share nothing from then on`)
}

try {
  await sandbox.files.write('shared.txt', 'from before')
  const name = await startCounter(sandbox)
  const n = await counted(sandbox, name, 3)
  const { snapshotId } = await sandbox.createSnapshot()
  const copies = [await Sandbox.create(snapshotId, { timeoutMs }), await Sandbox.create(snapshotId, { timeoutMs })]
  try {
    await goTheirOwnWays('snapshot', copies, name, n)
  } finally {
    for (const copy of copies) await copy.kill()
  }
  assert.equal(await Sandbox.deleteSnapshot(snapshotId), true)
  assert.equal(await Sandbox.deleteSnapshot(snapshotId), false)
  await assert.rejects(Sandbox.create(snapshotId), /not found|404/i)

  const forks = await sandbox.fork({ count: 2, timeoutMs })
  for (const fork of forks) assert.ok(fork instanceof Sandbox, String(fork))
  try {
    await goTheirOwnWays('fork', forks, name, n)
  } finally {
    for (const fork of forks) await fork.kill()
  }
} finally {
  await sandbox.kill()
}
