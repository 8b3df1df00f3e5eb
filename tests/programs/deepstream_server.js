// One of deepstream's servers, started by its API, so that the loss of Redis doesn't end it.
//
//   node deepstream_server.js FOLDER CONFIG
//
// FOLDER holds node_modules, and CONFIG is JSON. It prints its log; SIGTERM ends it.
'use strict'

const path = require('path')

const [folder, config] = process.argv.slice(2)
const { Deepstream } = require(path.join(folder, 'node_modules', '@deepstream', 'server'))

const server = new Deepstream(JSON.parse(config))
server.on('started', () => console.log('READY'))
// The names of the cluster's leader and of all its members, as this server has them.
process.on('SIGUSR2', () => {
  const registry = server.services.clusterRegistry
  console.log('LEADER ' + JSON.stringify([registry.getLeader(), registry.getAll()]))
})
process.on('SIGTERM', () => server.stop())
server.on('stopped', () => process.exit(0))
server.start()
