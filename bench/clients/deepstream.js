// The process in which deepstream's own connectors are measured: the counterpart of python.py.
//
//   node deepstream.js FOLDER HOST PORT DOCUMENT MESSAGE
//
// takes one JSON object a line and answers with one. FOLDER holds node_modules; DOCUMENT and
// MESSAGE, in JSON, are written and sent.
'use strict'

const path = require('path')
const readline = require('readline')

const [folder, host, port, document, message] = process.argv.slice(2)
const connector = (name) => require(path.join(folder, 'node_modules', '@deepstream', name)).default

// The connectors print warnings; standard output is for the answers alone.
console.log = console.info = console.trace = () => {}

const DOCUMENT = JSON.parse(document)
const MESSAGE = JSON.parse(message)
const VERSION = 1
const WINDOW = 1000
const NAMES = Array.from({ length: 10000 }, (_, number) => `user/${number}`)

const log = () => {}
const logger = { fatal: console.error, error: console.error, warn: log, info: log, debug: log }
logger.shouldLog = () => false
logger.getNameSpace = () => logger
const options = { host, port: Number(port) }
const cache = new (connector('cache-redis'))(options, { logger }, {})

function answer (value) {
  process.stdout.write(JSON.stringify(value) + '\n')
}

function get (name, done) {
  cache.get(name, (error, version, data) => {
    if (error || data === null) throw new Error(`get ${name}: ${error || 'not there'}`)
    done()
  })
}

function set (name, done) {
  cache.set(name, VERSION, DOCUMENT, (error) => {
    if (error) throw new Error(`set ${name}: ${error}`)
    done()
  })
}

// So many chains of operations at a time, each with one after the other.
function fromTasks (operation, tasks, records) {
  const each = Math.floor(records / tasks)
  return new Promise((resolve) => {
    let running = tasks
    for (let number = 0; number < tasks; number++) {
      let i = number * 7
      const last = i + each
      const next = () => {
        if (i < last) operation(NAMES[i++ % NAMES.length], next)
        else if (--running === 0) resolve(each * tasks)
      }
      next()
    }
  })
}

// A bulk is as many calls in one tick, which the connector sends together.
async function repeatedly (operation, size, times) {
  for (let time = 0; time < times; time++) {
    await new Promise((resolve) => {
      let left = size
      for (let i = 0; i < size; i++) operation(NAMES[i], () => { if (--left === 0) resolve() })
    })
  }
  return size * times
}

let heard = 0
let wanted = 0
let arrived = () => {}
let nodes = []

// Two nodes, which both send and hear each other.
async function subscribe () {
  const Connector = connector('clusternode-redis')
  nodes = ['js-1', 'js-2'].map((serverName) => new Connector(options, { logger }, { serverName }))
  for (const node of nodes) {
    node.subscribe(MESSAGE.topic, () => { if (++heard === wanted) arrived() })
  }
  await Promise.all(nodes.map((node) => node.whenReady()))
  // Nothing tells when a subscription has been confirmed.
  await new Promise((resolve) => setTimeout(resolve, 500))
}

// As many messages as that, of which a constant number is on its way.
function exchange (count) {
  heard = 0
  wanted = count
  let sent = 0
  return new Promise((resolve) => {
    arrived = () => resolve(count)
    const turn = () => {
      while (sent < count && sent - heard < WINDOW) nodes[sent++ % 2].send(MESSAGE)
      if (sent < count) setImmediate(turn)
    }
    turn()
  })
}

function seconds () {
  return Number(process.hrtime.bigint()) / 1e9
}

function work ({ operation, tasks, size }, records) {
  if (operation === 'messages') return exchange(records)
  const one = operation.startsWith('set') ? set : get
  if (operation.endsWith('_many')) return repeatedly(one, size, Math.floor(records / size))
  return fromTasks(one, tasks, records)
}

async function main () {
  // Its own isReady stays false for ever; this promise is what tells.
  await cache.whenReady()
  answer({})
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const asked = JSON.parse(line)
    if (asked.work.operation === 'messages' && !nodes.length) await subscribe()
    const before = process.cpuUsage()
    const began = seconds()
    const records = await work(asked.work, asked.records)
    const { user, system } = process.cpuUsage(before)
    answer({ records, seconds: seconds() - began, cpu: (user + system) / 1e6 })
  }
  process.exit()
}

main()
