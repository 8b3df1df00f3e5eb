// The process in which deepstream's own message connector is measured: two of its nodes, which
// both send and hear each other.
//
//   node messages.js FOLDER HOST PORT MESSAGE
//
// takes one JSON object a line and answers with one. FOLDER holds node_modules, and MESSAGE, in
// JSON, is what is sent.
'use strict'

const path = require('path')
const readline = require('readline')

const [folder, host, port, message] = process.argv.slice(2)
const modules = path.join(folder, 'node_modules')
const Connector = require(path.join(modules, '@deepstream', 'clusternode-redis')).default

const MESSAGE = JSON.parse(message)
const log = () => {}
const logger = { fatal: console.error, error: console.error, warn: log, info: log, debug: log }
const nodes = ['js-1', 'js-2'].map((serverName) =>
  new Connector({ host, port: Number(port) }, { logger }, { serverName }))

let heard = 0
let count = 0
let done = () => {}
for (const node of nodes) {
  node.subscribe(MESSAGE.topic, () => { if (++heard === count) done() })
}

function seconds () {
  return Number(process.hrtime.bigint()) / 1e9
}

// As many messages as that, of which so many are on their way at a time.
function measure (wanted, window) {
  heard = 0
  count = wanted
  let sent = 0
  const before = process.cpuUsage()
  const began = seconds()
  return new Promise((resolve) => {
    done = () => {
      const { user, system } = process.cpuUsage(before)
      resolve({ records: count, seconds: seconds() - began, cpu: (user + system) / 1e6 })
    }
    const turn = () => {
      while (sent < count && sent - heard < window) nodes[sent++ % 2].send(MESSAGE)
      if (sent < count) setImmediate(turn)
    }
    turn()
  })
}

async function main () {
  await Promise.all(nodes.map((node) => node.whenReady()))
  // Nothing tells when a subscription has been confirmed.
  await new Promise((resolve) => setTimeout(resolve, 500))
  process.stdout.write('{}\n')
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const asked = JSON.parse(line)
    process.stdout.write(JSON.stringify(await measure(asked.count, asked.window)) + '\n')
  }
  process.exit()
}

main()
