// deepstream's own message connector, told what to do: the counterpart of test_real_connector.py.
//
//   node connector.js FOLDER HOST PORT
//
// takes one JSON object a line and answers with one. FOLDER holds node_modules. What is heard is
// told as JSON.stringify writes it, when somebody asks for it.
'use strict'

const path = require('path')
const readline = require('readline')

const [folder, host, port] = process.argv.slice(2)
const modules = path.join(folder, 'node_modules')
const Connector = require(path.join(modules, '@deepstream', 'clusternode-redis')).default

const log = () => {}
const logger = { fatal: console.error, error: console.error, warn: log, info: log, debug: log }
const nodes = {}
const heard = {}

function open (serverName) {
  nodes[serverName] = new Connector({ host, port: Number(port) }, { logger }, { serverName })
  heard[serverName] = []
  return nodes[serverName].whenReady()
}

const actions = {
  open: ({ name }) => open(name),
  subscribe: ({ name, topic }) => {
    nodes[name].subscribe(topic, (message, from) => heard[name].push([JSON.stringify(message), from]))
  },
  send: ({ name, message }) => nodes[name].send(JSON.parse(message)),
  sendDirect: ({ name, to, message }) => nodes[name].sendDirect(to, JSON.parse(message)),
  heard: ({ name }) => heard[name]
}

async function main () {
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const asked = JSON.parse(line)
    const answer = await actions[asked.do](asked)
    process.stdout.write(JSON.stringify(answer === undefined ? null : answer) + '\n')
  }
  process.exit()
}

main()
