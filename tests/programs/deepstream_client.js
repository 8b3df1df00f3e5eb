// A client of deepstream, told what to do: one JSON object a line in, one a line out.
//
//   node deepstream_client.js FOLDER URL USERNAME
//
// FOLDER holds node_modules. Errors that the client logs are counted, and told by "errors".
'use strict'

const path = require('path')
const readline = require('readline')

const [folder, url, username] = process.argv.slice(2)
const modules = path.join(folder, 'node_modules', '@deepstream')
const { DeepstreamClient } = require(path.join(modules, 'client'))

const client = new DeepstreamClient(url, { heartbeatInterval: 60000, maxReconnectAttempts: 1000 })
const errors = []
client.on('error', (error, event, topic) => errors.push([String(error), String(event), topic]))
const events = []
const records = {}
const lists = {}
const changes = {}
const provided = []

const later = milliseconds => new Promise(resolve => setTimeout(resolve, milliseconds))

async function open (name) {
  if (records[name] && records[name].isReady) return records[name]
  const record = records[name] = client.record.getRecord(name)
  record.on('delete', () => { if (records[name] === record) delete records[name] })
  changes[name] = changes[name] || []
  record.subscribe(data => changes[name].push(data))
  await record.whenReady()
  return record
}

const handlers = {
  add: ({ a, b }, response) => response.send(a + b),
  echo: (data, response) => response.send(data),
  reject: (data, response) => response.reject(),
  error: (data, response) => response.error({ why: data }),
  slow: (data, response) => { setTimeout(() => response.send('late'), data) },
  deaf: (data, response) => { response.autoAccept = false },
  silent: () => {}
}

// Random writes, deletions, events and calls for a time; returns the counts of them.
async function stress ({ names, own, rpcs, milliseconds, pause }) {
  const end = Date.now() + milliseconds
  const counts = { written: 0, failed: 0, deleted: 0, emitted: 0, made: 0, unmade: 0, own: 0 }
  const pick = list => list[Math.floor(Math.random() * list.length)]
  const work = async kind => {
    const name = pick(names)
    if (kind < 0.45) {
      const record = await open(name)
      record.set(pick(['a', 'b', 'c.d']), Math.floor(Math.random() * 1e6))
      counts.written++
    } else if (kind < 0.6) {
      const record = await open(name)
      await record.setWithAck({ whole: Math.random() })
      counts.written++
    } else if (kind < 0.63) {
      const record = await open(name)
      await record.delete()
      counts.deleted++
    } else if (kind < 0.75) {
      client.event.emit(pick(['e/1', 'e/2']), { by: username, at: Date.now() })
      counts.emitted++
    } else if (kind < 0.85) {
      const result = await client.rpc.make(pick(rpcs), { a: 1, b: 2 })
      if (result !== 3) throw new Error('a wrong result ' + result)
      counts.made++
    } else {
      const record = await open(own)
      await record.setWithAck('n', counts.own + 1)
      counts.own++
    }
  }
  while (Date.now() < end) {
    const kind = Math.random()
    try {
      await Promise.race([work(kind), later(3000).then(() => { throw new Error('late') })])
    } catch (error) {
      kind >= 0.75 && kind < 0.85 ? counts.unmade++ : counts.failed++
    }
    await later(Math.random() * pause)
  }
  return counts
}

const actions = {
  stress,
  state: () => Object.fromEntries(Object.entries(records)
    .filter(([, record]) => record.isReady).map(([name, record]) => [name, [record.version, record.get()]])),
  subscribe: ({ name }) => client.event.subscribe(name, data => events.push([name, data])),
  unsubscribe: ({ name }) => client.event.unsubscribe(name),
  emit: ({ name, data }) => client.event.emit(name, data),
  events: () => events,
  open: async ({ name }) => { const record = await open(name); return [record.version, record.get()] },
  get: ({ name }) => records[name] ? [records[name].version, records[name].get()] : null,
  snapshot: ({ name }) => client.record.snapshot(name).catch(error => ({ error: String(error) })),
  set: async ({ name, data, path }) => {
    const record = await open(name)
    if (path) await record.setWithAck(path, data)
    else await record.setWithAck(data)
    return record.version
  },
  put: async ({ name, data, path }) => {
    const record = await open(name)
    path ? record.set(path, data) : record.set(data)
  },
  setData: ({ name, data }) => client.record.setDataWithAck(name, data),
  putData: ({ name, data }) => client.record.setData(name, data),
  delete: async ({ name }) => {
    const record = await open(name)
    await record.delete()
  },
  discard: ({ name }) => { records[name].discard(); delete records[name] },
  changes: ({ name }) => changes[name] || [],
  list: async ({ name }) => {
    const list = lists[name] = lists[name] || client.record.getList(name)
    await list.whenReady()
    return list.getEntries()
  },
  addEntry: ({ name, entry }) => lists[name].addEntry(entry),
  removeEntry: ({ name, entry }) => lists[name].removeEntry(entry),
  provide: ({ name, kind }) => {
    client.rpc.provide(name, (data, response) => {
      provided.push([name, data === undefined ? null : data])
      handlers[kind](data, response)
    })
  },
  unprovide: ({ name }) => client.rpc.unprovide(name),
  provided: () => provided,
  make: ({ name, data }) => client.rpc.make(name, data).then(
    result => ({ result }), error => ({ error })),
  online: () => client.presence.getAll(),
  errors: () => errors,
  sleep: ({ milliseconds }) => later(milliseconds)
}

async function main () {
  await client.login({ username })
  console.log('READY')
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const asked = JSON.parse(line)
    const run = async () => actions[asked.do](asked)
    run().then(
      answer => ({ id: asked.id, answer: answer === undefined ? null : answer }),
      error => ({ id: asked.id, failed: String(error) })
    ).then(answer => process.stdout.write(JSON.stringify(answer) + '\n'))
  }
  client.close()
  process.exit()
}

main()
