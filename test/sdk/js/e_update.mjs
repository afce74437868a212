// Program e: a transfer in progress to an address that becomes denied stops within a second.
import { Sandbox } from '@e2b/code-interpreter'
import { assert, patience, saw, until } from './check.mjs'
import { reach } from './egress.mjs'

const sandbox = await Sandbox.create()
try {
  // bash's own TCP client: the stream is bytes without end, no HTTP
  const transfer = `cat < /dev/tcp/8.8.8.8/${process.env.LAB_STREAM_PORT} > /tmp/stream; echo ended $? > /tmp/ended`
  await sandbox.commands.run(transfer, { background: true })
  const size = async () => Number((await sandbox.commands.run('stat -c %s /tmp/stream 2>/dev/null || echo 0')).stdout)
  const busyDisk = 60_000 // the kernel holds a writer up for as long
  const first = await until('the transfer starts', size, busyDisk)
  await until('the transfer goes on', async () => (await size()) > first, busyDisk)

  const start = Date.now()
  await sandbox.updateNetwork({ denyOut: ['8.8.8.8'] })
  const ended = await until('the transfer stops', async () => (await sandbox.files.exists('/tmp/ended')) && sandbox.files.read('/tmp/ended'), 3000)
  const took = Date.now() - start
  saw('transfer', `${ended.trim()} within ${took} ms of the update`)
  assert.ok(took < 1000 * patience, `the transfer went on for ${took} ms`)
  assert.notEqual(ended.trim(), 'ended 0')

  assert.deepEqual(await reach(sandbox, ['1.1.1.1', '8.8.8.8']), { '1.1.1.1': 'tcp udp', '8.8.8.8': '' })
  await sandbox.updateNetwork({ allowOut: [], denyOut: [] })
  assert.deepEqual(await reach(sandbox, ['8.8.8.8']), { '8.8.8.8': 'tcp udp' })
  await sandbox.updateNetwork({ allowInternetAccess: false })
  assert.deepEqual(await reach(sandbox, ['1.1.1.1', '8.8.8.8']), { '1.1.1.1': '', '8.8.8.8': '' })
  saw('rules', 'denied, opened and closed again on the running sandbox')
} finally {
  await sandbox.kill()
}
