// Program d: the sandbox reaches exactly what its rules say; private and metadata ranges never.
import { ALL_TRAFFIC, Sandbox } from '@e2b/code-interpreter'
import { assert, saw } from './check.mjs'
import { reach } from './egress.mjs'

const both = 'tcp udp'
const hosts = ['1.1.1.1', '8.8.8.8', '8.8.4.4', '9.9.9.9']
const never = ['10.99.0.1', '169.254.169.254', '192.168.99.1', '172.16.99.1', '100.64.99.1']
const nowhere = Object.fromEntries(never.map((a) => [a, '']))

const cases = [
  ['no rules', {}, { '1.1.1.1': both, '8.8.8.8': both, '8.8.4.4': both, '9.9.9.9': both }],
  ['allowInternetAccess: false', { allowInternetAccess: false }, { '1.1.1.1': '', '8.8.8.8': '', '8.8.4.4': '', '9.9.9.9': '' }],
  ['deny all, allow two', { network: { denyOut: [ALL_TRAFFIC], allowOut: ['1.1.1.1', '8.8.8.0/24'] } },
    { '1.1.1.1': both, '8.8.8.8': both, '8.8.4.4': '', '9.9.9.9': '' }],
  ['deny one', { network: { denyOut: ['8.8.8.8'] } }, { '1.1.1.1': both, '8.8.8.8': '', '8.8.4.4': both, '9.9.9.9': both }],
  ['both lists, allow wins', { network: { denyOut: ['8.8.8.8'], allowOut: ['8.8.8.8'] } }, { '1.1.1.1': both, '8.8.8.8': both, '8.8.4.4': both, '9.9.9.9': both }],
  ['private is never allowed', { network: { allowOut: never } }, { '1.1.1.1': both, '8.8.8.8': both, '8.8.4.4': both, '9.9.9.9': both }],
]
for (const [name, options, want] of cases) {
  const sandbox = await Sandbox.create(options)
  try {
    const got = await reach(sandbox, [...hosts, ...never])
    saw(name, got)
    assert.deepEqual(got, { ...want, ...nowhere }, name)
  } finally {
    await sandbox.kill()
  }
}
