// What the programs about virtual machines share: a process that remembers who it is, to be found again after a pause or in a copy.
import { randomUUID } from 'node:crypto'
import https from 'node:https'
import { assert, until } from './check.mjs'

const counter = `
import os, sys, time
name, n = sys.argv[1], 0
while True:
    n += 1
    with open('/tmp/count.new', 'w') as f: f.write('%s %d' % (name, n))
    os.rename('/tmp/count.new', '/tmp/count')
    time.sleep(0.1)
`

/** Starts a process that counts, and knows the name that it is given in its memory only. */
export async function startCounter(sandbox) {
  const name = randomUUID()
  await sandbox.files.write('/tmp/counter.py', counter)
  await sandbox.commands.run(`python /tmp/counter.py ${name}`, { background: true, timeoutMs: 0 })
  await counted(sandbox, name, 3)
  return name
}

/** Waits until the counter of that name has come further than n, and returns how far. */
export async function counted(sandbox, name, n) {
  return until(`the counter comes past ${n}`, async () => {
    const [who, count] = (await sandbox.files.read('/tmp/count').catch(() => 'nobody 0')).split(' ')
    if (who !== name) assert.equal(who, 'nobody', 'another process counts')
    return Number(count) > n && Number(count)
  })
}

/** One GET over a connection of its own, without the limits that fetch has for connecting. */
export function fetchOnce(url, headers = {}) {
  return new Promise((resolve, reject) => {
    https.get(url, { headers, agent: new https.Agent({ keepAlive: false }) }, async (answer) => {
      let text = ''
      for await (const chunk of answer) text += chunk
      resolve({ status: answer.statusCode, text })
    }).on('error', reject)
  })
}

/** What no two machines may share. */
export async function identity(sandbox) {
  const script = 'cat /etc/machine-id /proc/sys/kernel/random/uuid; hostname; head -c 16 /dev/urandom | od -An -tx1'
  return (await sandbox.commands.run(script)).stdout.trim().split('\n').map((line) => line.trim())
}
