// A headless Chromium, told what to do: the counterpart of test_browser_example.py.
//
//   node browser.js FOLDER URL
//
// FOLDER holds node_modules. One JSON object a line in, one a line out.
'use strict'

const path = require('path')
const readline = require('readline')

const [folder, url] = process.argv.slice(2)
const modules = path.join(folder, 'node_modules')
// The libraries that Chromium needs are unpacked for this system.
process.env.AWS_LAMBDA_JS_RUNTIME = 'nodejs20.x'
const chromium = require(path.join(modules, '@sparticuz', 'chromium'))
const puppeteer = require(path.join(modules, 'puppeteer-core'))

async function main () {
  const executablePath = await chromium.executablePath()
  const browser = await puppeteer.launch({ executablePath, args: chromium.args, headless: 'shell' })
  const page = await browser.newPage()
  const errors = []
  page.on('pageerror', error => errors.push(String(error)))
  await page.goto(url)
  const actions = {
    text: ({ id }) => page.$eval(`#${id}`, element => element.textContent),
    click: ({ id }) => page.click(`#${id}`),
    errors: () => errors
  }
  console.log('READY')
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const asked = JSON.parse(line)
    const answer = await actions[asked.do](asked)
    console.log(JSON.stringify(answer === undefined ? null : answer))
  }
  await browser.close()
  process.exit()
}

main().catch(error => { console.error(error); process.exit(1) })
