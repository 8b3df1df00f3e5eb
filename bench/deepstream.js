// The process in which deepstream's own connector is measured: the counterpart of worker.py.
//
//   node deepstream.js FOLDER HOST PORT DOCUMENT
//
// takes one JSON object a line and answers with one. FOLDER holds node_modules,
// and DOCUMENT, in JSON, is what is written.
'use strict'

const path = require('path')
const readline = require('readline')

const [folder, host, port, document] = process.argv.slice(2)
const Connector = require(path.join(folder, 'node_modules', '@deepstream', 'cache-redis')).default

// The connector talks of what it thinks odd; standard output is for the answers alone.
console.log = console.info = console.trace = () => {}

const DOCUMENT = JSON.parse(document)
const VERSION = 1
const PERCENTILES = [50, 90, 99, 99.9]
const NAMES = Array.from({ length: 10000 }, (_, number) => `user/${number}`)

const log = () => {}
const said = { fatal: console.error, error: console.error, warn: log, info: log, debug: log }
said.shouldLog = () => false
const cache = new Connector({ host, port: Number(port) }, { logger: { getNameSpace: () => said } }, {})

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
        if (i === last) {
          if (--running === 0) resolve()
        } else {
          operation(NAMES[i++ % NAMES.length], next)
        }
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
}

function seconds () {
  return Number(process.hrtime.bigint()) / 1e9
}

async function measure ({ operation, tasks, size }, records) {
  const one = operation.startsWith('set') ? set : get
  const before = process.cpuUsage()
  const began = seconds()
  if (operation.endsWith('_many')) {
    await repeatedly(one, size, Math.floor(records / size))
    records = Math.floor(records / size) * size
  } else {
    await fromTasks(one, tasks, records)
    records = Math.floor(records / tasks) * tasks
  }
  const took = seconds() - began
  const { user, system } = process.cpuUsage(before)
  return { records, seconds: took, cpu: (user + system) / 1e6 }
}

// As in worker.py: each operation is timed from when it should have begun.
function latency (count, rate, window) {
  const due = new Float64Array(count)
  let at = 0
  for (let i = 0; rate && i < count; i++) due[i] = (at += -Math.log(1 - Math.random()) / rate)
  const latencies = new Float64Array(count)
  return new Promise((resolve) => {
    let ended = 0
    let i = 0
    const began = seconds()
    const issue = (since) => {
      get(NAMES[i++ % NAMES.length], () => { latencies[ended++] = seconds() - since })
    }
    const turn = () => {
      const now = seconds()
      if (rate) while (i < count && began + due[i] <= now) issue(began + due[i])
      else while (i < count && i - ended < window) issue(now)
      if (ended < count) return setImmediate(turn)
      const took = seconds() - began
      latencies.sort()
      const percentiles = {}
      for (const one of PERCENTILES) {
        percentiles[one] = latencies[Math.min(count - 1, Math.floor(count * one / 100))]
      }
      resolve({ rate: count / took, percentiles, most: latencies[count - 1] })
    }
    turn()
  })
}

async function main () {
  // Its own isReady stays false for ever; this promise is what tells.
  await cache.whenReady()
  answer({})
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const asked = JSON.parse(line)
    if (asked.do === 'work') answer(await measure(asked.work, asked.records))
    else if (asked.do === 'latency') answer(await latency(asked.count, asked.rate, asked.window))
    else answer({ error: `deepstream.js can't ${asked.do}` })
  }
  await cache.close()
}

main()
